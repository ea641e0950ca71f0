"""Experiment C: how close the average cost comes to the asked one, at depths of 4, 8 and 28 layers."""

from __future__ import annotations

import torch
from pared_bench import BenchContext, Record

from framefusion.config import FrameFusionConfig
from framefusion.functional import Controller

DEPTHS = (4, 8, 28)
COSTS = (0.15, 0.3, 0.5, 0.7)
CLIPS, FRAMES, PATCHES, WIDTH = 20, 16, 16, 32


def run(context: BenchContext) -> list[Record]:
    """Largest and mean distance over random videos of different redundancy and thresholds of 0.3 to 0.95."""
    records = []
    for depth in DEPTHS:
        for cost in COSTS:
            errors = [abs(average_cost(depth, cost, seed) - cost) for seed in range(CLIPS)]
            settings = {"experiment": "budget", "layers": depth, "asked": cost, "tokens": FRAMES * PATCHES}
            mean, worst = sum(errors) / len(errors), max(errors)
            records.append(Record("framefusion", "framefusion", "error", mean, "", settings, (0.0, worst), CLIPS))
            records.append(Record("framefusion", "framefusion", "largest error", worst, "", settings, samples=CLIPS))
    return records


def average_cost(depth: int, cost: float, seed: int) -> float:
    """Share of the vision tokens present, averaged over layers, of one random video through a toy stack."""
    generator = torch.Generator().manual_seed(seed)
    patch = torch.arange(PATCHES).repeat(FRAMES)
    still = torch.randn(PATCHES, WIDTH, generator=generator).repeat(FRAMES, 1)
    moving = torch.rand(len(patch), 1, generator=generator) * torch.randn(len(patch), WIDTH, generator=generator)
    hidden = (still + moving)[None]
    threshold = 0.3 + 0.65 * torch.rand((), generator=generator).item()
    config = FrameFusionConfig(cost=cost, similarity_threshold=threshold)
    controller = Controller(config, patch, torch.zeros_like(patch), depth)
    present = []
    for _ in range(depth):
        importance = None
        if controller.wants_importance:
            importance = torch.rand(1, hidden.shape[1], generator=generator)
        hidden, kept = controller.step(hidden, importance)
        present.append(len(kept) / len(patch))
        hidden = hidden + 0.2 * torch.randn(hidden.shape, generator=generator)
    return sum(present) / depth
