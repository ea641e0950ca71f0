"""The paper's observations on the zoo's model: which tokens are alike, how that changes with depth, who keeps rank."""

from __future__ import annotations

from typing import Any

import torch
from pared_bench import BenchContext, Record
from torch import Tensor

from framefusion.bench.claims import claim
from framefusion.bench.world import CALIBRATION_SEED, FRAMES, World
from framefusion.functional import adjacent_similarity, predecessor

CLIPS = 24
RANKED_LAYERS = 5


@torch.no_grad()
def run(context: BenchContext, world: World) -> list[Record]:
    """Mean cosines of three kinds of pairs at the LLM's input; by layer, shares above thresholds, rank correlation."""
    from pared_zoo.recipes.exam import exam, exam_pixels

    sheets = exam(1, CALIBRATION_SEED + 1, FRAMES)[:CLIPS]
    frames = exam_pixels(sheets, CALIBRATION_SEED + 1)
    question = next(iter(sheets[0][2].values())).text
    states = states_of(world, frames, question)
    base: dict[str, Any] = {"experiment": "observations", "model": world.name}
    means = pair_means(states[0], world.frame_tokens)
    records = [
        Record("framefusion", name, "mean cosine", value, "", base, samples=len(sheets))
        for name, value in means.items()
    ]
    same, beside, random = means.values()
    claims = {**base, "experiment": "observed"}
    records.append(claim("same place above same frame by 0.1", [same - beside - 0.1], claims))
    records.append(claim("same frame above random pairs by 0.1", [beside - random - 0.1], claims))
    similar = [similarities(one, world.frame_tokens) for one in states]
    for layer, one in enumerate(similar):
        for threshold in (0.5, 0.7, 0.9):
            share = (one >= threshold).float().mean().item()
            settings = {**base, "experiment": "alike by layer", "layer": layer}
            records.append(Record("framefusion", f"cosine of at least {threshold}", "share", share, "", settings))
    first = similar[0].flatten()
    ranks = [spearman(first, one.flatten()) for one in similar[1:RANKED_LAYERS]]
    records.append(claim("rank correlation of at least 0.6 in all layers", [min(ranks) - 0.6], claims))
    for layer, value in enumerate(ranks, 1):
        settings = {**base, "experiment": "rank correlation", "layer": layer}
        records.append(Record("framefusion", "with the input", "spearman", value, "", settings))
    return records


def states_of(world: World, frames: Tensor, question: str) -> list[Tensor]:
    """Hidden states of the video at the input of every layer and after the last, (clips, tokens, channels) each."""
    inputs = world.prompts(frames, [question] * len(frames))
    where = inputs["input_ids"] == world.model.config.video_token_id
    out = world.model(**inputs, output_hidden_states=True, use_cache=False)
    count = frames.shape[1] * world.frame_tokens
    rows = [one[where].unflatten(0, (len(frames), -1))[:, :count] for one in out.hidden_states]
    return list(rows)


def similarities(states: Tensor, patches: int) -> Tensor:
    """Cosine of every token and the one at its place in the frame before, (clips, tokens - patches)."""
    patch = (torch.arange(states.shape[1], device=states.device) % patches).expand(states.shape[:2]).contiguous()
    return adjacent_similarity(states, predecessor(patch, torch.zeros_like(patch)))[:, patches:]


def pair_means(states: Tensor, patches: int) -> dict[str, float]:
    """Mean cosine of pairs of one place and neighbouring frames, of neighbours in one frame, and of random pairs."""
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    generator = torch.Generator().manual_seed(0)
    shuffled = unit[:, torch.randperm(unit.shape[1], generator=generator).to(unit.device)]
    inside = (torch.arange(1, unit.shape[1], device=unit.device) % patches) != 0
    return {
        "same place, next frame": (unit[:, patches:] * unit[:, :-patches]).sum(-1).mean().item(),
        "next place, same frame": (unit[:, 1:] * unit[:, :-1]).sum(-1)[:, inside].mean().item(),
        "random pairs": (unit * shuffled).sum(-1).mean().item(),
    }


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors."""
    ranks = torch.stack([one.argsort().argsort().double() for one in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()
