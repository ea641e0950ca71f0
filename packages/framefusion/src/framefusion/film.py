"""Frames out of a video file, and pictures of which tokens are left of a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

EXTRA = "pip install 'framefusion[video]'"
GONE, MERGED = (0, 0, 0), (230, 60, 60)


def read_film(path: str | Path, frames: int) -> np.ndarray:
    """`frames` frames spread evenly over a video file, uint8 (frames, height, width, 3).

    Raises FileNotFoundError for a missing file, ValueError for one without pictures, and ModuleNotFoundError, with the
    line to type, without PyAV.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading video files needs PyAV: {EXTRA}", name="av") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such video file")
    try:
        with av.open(str(path)) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.error.InvalidDataError, IndexError) as error:
        raise ValueError(f"{path}: not a video that PyAV can read ({error})") from error
    if not pictures:
        raise ValueError(f"{path}: the file has no pictures")
    return np.stack([pictures[i] for i in np.linspace(0, len(pictures) - 1, frames).round().astype(int)])


def states_of_tokens(kept: Tensor, groups: Tensor, places: Tensor) -> Tensor:
    """What became of the tokens at `places` (count,) of one sequence: 2 left, 1 merged into another, 0 pruned.

    `kept` (n,) int64 positions left in the end, `groups` (tokens,) int64 the row each token went into or -1.
    """
    left = torch.isin(places, kept.to(places.device))
    return torch.where(left, 2, (groups.to(places.device)[places] >= 0).long())


def draw_tokens(frames: np.ndarray, states: Tensor, scale: int = 1) -> np.ndarray:
    """A strip of the frames (count, height, width, 3) uint8 with their tokens drawn on.

    `states` (count, rows, columns) as `states_of_tokens` has them: tokens that are left show the picture, merged ones
    are tinted red, pruned ones are black. Returns uint8 (height, count * width, 3).
    """
    strip = []
    for picture, grid in zip(frames, states.cpu().numpy(), strict=True):
        height, width = picture.shape[:2]
        rows = np.arange(height) * grid.shape[0] // height
        columns = np.arange(width) * grid.shape[1] // width
        state = grid[rows][:, columns][..., None]
        shown = picture.astype(np.float32)
        tinted = 0.35 * shown + 0.65 * np.array(MERGED, np.float32)
        out = np.where(state == 2, shown, np.where(state == 1, tinted, 0.12 * shown + np.array(GONE)))
        # A thin line between frames and tokens.
        out[rows != np.roll(rows, 1)] *= 0.7
        out[:, columns != np.roll(columns, 1)] *= 0.7
        strip.append(np.repeat(np.repeat(out.clip(0, 255).astype(np.uint8), scale, 0), scale, 1))
    return np.concatenate(strip, axis=1)


def grid_shape(patches: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of a frame of `patches` tokens whose picture is `width` to `height`; (1, patches) if unknown."""
    sides = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    return min(sides, key=lambda side: abs(np.log(side[1] / side[0] * height / width)))


def processor_inputs(processor: Any, film: np.ndarray, question: str, device: torch.device) -> dict[str, Any]:
    """Arguments of a model for one question about a film (frames, height, width, 3) uint8, by its own processor."""
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], videos=[film], return_tensors="pt", do_sample_frames=False)
    return {name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)}
