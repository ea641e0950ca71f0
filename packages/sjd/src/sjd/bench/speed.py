"""Wall clock, measured in turns: plain decoding, and sjd by window; and what a pass costs by its width."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import time_paired

from sjd.bench.world import GUIDANCE, Arm, Sampling, World

WINDOWS = (1, 3, 7, 15, 31, 63)


def run(context: BenchContext, world: World) -> list[Record]:
    """Time of an image by window, sampled and greedy; of several images at once; of one pass by its width."""
    rounds = 9 if context.full else 5
    records = batch_of(context, world, 1, WINDOWS, rounds)
    records += batch_of(context, world, 1, WINDOWS[1:4], max(rounds - 2, 3), greedy=True)
    for batch in (4, 16):
        records += batch_of(context, world, batch, WINDOWS[1:4], 3)
    return records + width_of_a_pass(context, world, rounds)


def batch_of(
    context: BenchContext, world: World, batch: int, windows: tuple[int, ...], rounds: int, greedy: bool = False
) -> list[Record]:
    """Plain decoding is the model's own loop with its own cache; every call draws other pictures."""
    model, captions = world.pipeline.transformer, world.captions[:batch]
    seeds = itertools.count(context.seed)
    # A temperature near 0 is the model's greedy decoding.
    options = {"guidance_scale": GUIDANCE, "temperature": 1e-4 if greedy else 1.0}

    def plain() -> Any:
        generator = torch.Generator(context.device).manual_seed(next(seeds))
        return model.generate(*world.condition(captions), generator=generator, **options)

    def ours(arm: Arm) -> Any:
        sampling = Sampling(greedy=greedy)
        return world.engine(arm, captions, sampling, next(seeds)).run()

    candidates: dict[str, Callable[[], Any]] = {"plain": plain}
    candidates["one token a pass, our loop"] = partial(ours, Arm("plain", 0))
    for window in windows:
        candidates[f"maximal, {window}"] = partial(ours, Arm("maximal", window))
    if not greedy:
        candidates["independent, random, 15 (paper)"] = partial(ours, Arm("paper", 15, "independent", "random"))
    timings = time_paired(candidates, device=context.device, rounds=rounds, warmup=1, clock=clock_of(context))
    settings = {"experiment": "speed", "model": "ar-world", "batch": batch, "greedy": greedy, "guidance": GUIDANCE}
    return timings.records("sjd", "plain", settings)


def clock_of(context: BenchContext) -> Literal["auto", "wall"]:
    """What a user waits for: process time would count a pass that fills two cores twice."""
    return "auto" if context.device.type == "cuda" else "wall"


def width_of_a_pass(context: BenchContext, world: World, rounds: int) -> list[Record]:
    """Time of a forward pass by the tokens in it, relative to one: what a gain in passes must pay for."""
    engines = {f"{width} tokens": _in_the_middle(world, width - 1) for width in (1, 4, 8, 16, 32, 64)}
    candidates = {name: engine._advance for name, engine in engines.items()}
    timings = time_paired(candidates, device=context.device, rounds=rounds, warmup=2, clock=clock_of(context))
    settings = {"experiment": "cost of a pass", "model": "ar-world", "batch": 1, "guidance": GUIDANCE}
    return timings.records("sjd", "1 tokens", settings)


def _in_the_middle(world: World, window: int) -> Any:
    """An engine that has committed half of its image and commits nothing more."""
    engine = world.engine(Arm("maximal", window), world.captions[:1], Sampling(), 0)
    while int(engine.window.committed.min()) < engine.tokens.shape[1] // 2:
        engine._advance()
    engine.window.ends = engine.window.committed.clone()
    return engine
