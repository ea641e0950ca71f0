"""What `pared bench framefusion` measures: answers and tokens, redundancy, the budget, and speed."""

from __future__ import annotations

import torch
from pared_bench import BenchContext, Record

EXPERIMENTS = ("answers", "observations", "redundancy", "budget", "speed")


def run(
    context: BenchContext,
    *,
    experiments: str = ",".join(EXPERIMENTS),
    model: str = "",
    questions: int = 40,
    seeds: int = 3,
) -> list[Record]:
    """Measure `experiments` (names joined by commas).

    `model` is a folder in place of the zoo's vlm-world; `questions` are asked of each task for each of `seeds` streams
    of clips. Raises ValueError for an unknown experiment or a count below one.
    """
    chosen = [name.strip() for name in experiments.split(",") if name.strip()]
    if unknown := sorted(set(chosen) - set(EXPERIMENTS)):
        raise ValueError(f"experiments={unknown[0]!r} must be among {', '.join(EXPERIMENTS)}")
    for name, count in (("questions", questions), ("seeds", seeds)):
        if count < 1:
            raise ValueError(f"{name}={count!r} must be at least 1")
    records: list[Record] = []
    if {"answers", "observations", "redundancy"} & set(chosen):
        from framefusion.bench import answers, observations, redundancy
        from framefusion.bench.world import World

        if "answers" in chosen:
            records += answers.run(context, World.load(model, context.device, torch.bfloat16), questions, seeds)
        world = World.load(model, context.device)
        if "observations" in chosen:
            records += observations.run(context, world)
        if "redundancy" in chosen:
            records += redundancy.run(context, world)
    if "budget" in chosen:
        from framefusion.bench import budget

        records += budget.run(context)
    if "speed" in chosen:
        from framefusion.bench import speed

        records += speed.run(context)
    return records
