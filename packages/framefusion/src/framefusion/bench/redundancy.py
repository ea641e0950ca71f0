"""Real clips: how much of each is alike by layer, and how much FrameFusion merges of a still and of a moving one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pared_bench import BenchContext, Record
from torch import Tensor

from framefusion.apply import applied
from framefusion.bench.claims import claim
from framefusion.bench.observations import similarities, states_of
from framefusion.bench.world import World
from framefusion.config import FrameFusionConfig

CLIP_FRAMES = 32
QUESTION = "what color is the object that moves?"


def fit_frames(film: np.ndarray, frames: int, side: int) -> Tensor:
    """`frames` frames of a film (count, height, width, 3) uint8, the middle square of each: (frames, 3, side, side)."""
    from PIL import Image

    chosen = film[np.linspace(0, len(film) - 1, frames).round().astype(int)]
    short = min(chosen.shape[1:3])
    top, left = ((size - short) // 2 for size in chosen.shape[1:3])
    square = chosen[:, top : top + short, left : left + short]
    scaled = [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BOX)) for one in square]
    return torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2)


@torch.no_grad()
def run(context: BenchContext, world: World) -> list[Record]:
    """Shares above thresholds by layer for three films and for the first picture of each, repeated; what is merged."""
    from pared_zoo.real.clips import CLIPS, clip

    side = world.model.config.vision_config.image_size
    records, merged = [], {}
    for name in context.track(list(CLIPS), "real clips"):
        moving = fit_frames(clip(name, frames=4 * CLIP_FRAMES), CLIP_FRAMES, side)
        for variant, film in ((name, moving), (f"{name}, first picture repeated", moving[:1].expand_as(moving))):
            states = states_of(world, film[None].contiguous(), QUESTION)
            base: dict[str, Any] = {"experiment": "redundancy of real clips", "model": world.name}
            for layer, one in enumerate(states):
                alike = similarities(one, world.frame_tokens)
                for threshold in (0.5, 0.7, 0.9):
                    share = (alike >= threshold).float().mean().item()
                    settings = {**base, "layer": layer, "cosine": threshold}
                    records.append(Record("framefusion", variant, "share alike", share, "", settings))
            with applied(world.model, FrameFusionConfig(cost=0.3, similarity_threshold=0.9)) as handle:
                world.model(**world.prompts(film[None].contiguous(), [QUESTION]), use_cache=False)
                merged[variant] = fraction = handle.trace[0].fraction[0] or 0.0
            settings = {**base, "experiment": "merged before the first layer", "cosine": 0.9}
            records.append(Record("framefusion", variant, "fraction", fraction, "", settings))
    settings = {"experiment": "redundancy of real clips", "model": world.name, "cosine": 0.9}
    margins = [merged[f"{name}, first picture repeated"] - merged[name] for name in CLIPS]
    records.append(claim("more merges in a still picture than in a film", margins, settings))
    return records
