"""Wall clock, measured in turns: plain decoding, n-gram assistance where the model has it, and sjd by window."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import time_paired

from sjd.apply import applied
from sjd.bench.world import GUIDANCE, Arm, Sampling, World
from sjd.config import SJDConfig

WINDOWS = (1, 3, 7, 15, 31, 63)


def run(context: BenchContext, world: World) -> list[Record]:
    """Time of an image by window, sampled and greedy; of several images at once; of one pass by its width."""
    rounds = 9 if context.full else 5
    records = batch_of(context, world, 1, WINDOWS, rounds)
    records += batch_of(context, world, 1, WINDOWS[1:4], max(rounds - 2, 3), greedy=True)
    for batch in (4, 16):
        records += batch_of(context, world, batch, WINDOWS[1:4], 3)
    records += width_of_a_pass(context, world, rounds)
    return records + assisted(context, rounds)


def batch_of(
    context: BenchContext, world: World, batch: int, windows: tuple[int, ...], rounds: int, greedy: bool = False
) -> list[Record]:
    """Plain decoding is the model's own loop with its own cache; every call draws other pictures."""
    condition, mask = world.pipeline.encode_prompt(world.captions[:batch])
    mask = None if mask is None or bool(mask.all()) else mask
    model = world.pipeline.transformer
    seeds = itertools.count(context.seed)
    # A temperature near 0 is the model's greedy decoding.
    options = {"guidance_scale": GUIDANCE, "temperature": 1e-4 if greedy else 1.0}

    def plain() -> Any:
        return model.generate(condition, mask, generator=torch.Generator().manual_seed(next(seeds)), **options)

    def ours(arm: Arm) -> Any:
        sampling = Sampling(greedy=greedy)
        return world.engine(arm, world.captions[:batch], sampling, next(seeds)).run()

    candidates: dict[str, Callable[[], Any]] = {"plain": plain}
    candidates["one token a pass, our loop"] = partial(ours, Arm("plain", 0))
    for window in windows:
        candidates[f"maximal, {window}"] = partial(ours, Arm("maximal", window))
    if not greedy:
        candidates["independent, random, 15 (paper)"] = partial(ours, Arm("paper", 15, "independent", "random"))
    timings = time_paired(candidates, device=context.device, rounds=rounds, warmup=1)
    settings = {"experiment": "speed", "model": "ar-world", "batch": batch, "greedy": greedy, "guidance": GUIDANCE}
    return timings.records("sjd", "plain", settings)


def width_of_a_pass(context: BenchContext, world: World, rounds: int) -> list[Record]:
    """Time of a forward pass by the tokens in it, relative to one: what a gain in passes must pay for."""
    engines = {f"{width} tokens": _in_the_middle(world, width - 1) for width in (1, 4, 8, 16, 32, 64)}
    candidates = {name: engine._advance for name, engine in engines.items()}
    timings = time_paired(candidates, device=context.device, rounds=rounds, warmup=2)
    settings = {"experiment": "cost of a pass", "model": "ar-world", "batch": 1, "guidance": GUIDANCE}
    return timings.records("sjd", "1 tokens", settings)


def _in_the_middle(world: World, window: int) -> Any:
    """An engine that has committed half of its image and commits nothing more."""
    engine = world.engine(Arm("maximal", window), world.captions[:1], Sampling(), 0)
    while int(engine.window.committed.min()) < engine.tokens.shape[1] // 2:
        engine._advance()
    engine.window.ends = engine.window.committed.clone()
    return engine


def assisted(context: BenchContext, rounds: int) -> list[Record]:
    """On emu3-world, a model of transformers: its own generation, its n-gram assistance, and sjd."""
    settings = {"experiment": "speed", "model": "emu3-world", "batch": 1, "greedy": True}
    try:
        model, inputs = emu3_world(context.device)
    except (FileNotFoundError, ValueError) as error:
        return [Record("sjd", "sjd", "speed-up over generate", None, "×", settings, note=str(error))]
    records: list[Record] = []
    for greedy in (True, False):
        options = {**inputs, "do_sample": not greedy, **({} if greedy else {"top_k": 0})}
        grid = options.pop("image_grid")
        length = grid[0] * (grid[1] + 1) + 3
        generate = partial(model.generate, max_new_tokens=length, min_new_tokens=length, **options)
        candidates: dict[str, Callable[[], Any]] = {
            "generate": generate,
            "n-gram assistance": partial(generate, prompt_lookup_num_tokens=8),
        }
        for window in (7, 15, 31):
            candidates[f"maximal, {window}"] = partial(_with_sjd, model, options, grid, length, window)
        timings = time_paired(candidates, device=context.device, rounds=rounds, warmup=1)
        records += timings.records("sjd", "generate", {**settings, "greedy": greedy})
    return records


def _with_sjd(model: Any, options: dict[str, Any], grid: tuple[int, int], length: int, window: int) -> Any:
    with applied(model, SJDConfig(window=window)):
        return model.generate(max_new_tokens=length, image_grid=grid, **options)


def emu3_world(device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The model, and the inputs of one prompt; raises FileNotFoundError or ValueError where the zoo lacks it."""
    import pared_zoo
    from pared_zoo.recipes.sd_world import held_out_scenes
    from pared_zoo.world import caption
    from transformers import Emu3Processor

    model = pared_zoo.load("emu3-world").to(device)
    processor = Emu3Processor.from_pretrained(pared_zoo.path("emu3-world"))
    made = processor(
        text=[caption(held_out_scenes(1)[0])],
        return_for_image_generation=True,
        image_area=(16 * 8) ** 2,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    sizes = made.pop("image_sizes")
    return model, {**{name: one.to(device) for name, one in made.items()}, "image_grid": tuple(map(int, sizes[0]))}
