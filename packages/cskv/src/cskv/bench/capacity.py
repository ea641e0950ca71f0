"""Section 11 (b): how many long sequences a GPU holds, and how many tokens a second they give together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import time_paired

from cskv.bench.full_size import LLAMA_8B, Setting, prefilled, stepper, twins
from cskv.bench.speed import VARIANTS

TOKENS = 32_768
MOST = 1024


def run(context: BenchContext) -> list[Record]:
    """The largest batch of each cache before the memory runs out, and its tokens a second."""
    setting = Setting("Llama-3.1-8B", LLAMA_8B, TOKENS, 1, torch.bfloat16)
    settings = setting.record("capacity")
    del settings["batch"]
    if context.device.type != "cuda":
        note = f"the memory of a GPU is what is filled here; this is {context.device}"
        return [Record("cskv", "full cache", "largest batch", None, "", settings, note=note)]
    model, ids = setting.model(context), setting.ids(context)
    records = measure(context, "full cache", model, ids, None, settings)
    for name, config in VARIANTS.items():
        with twins(model, {name: config}) as models:
            for _, twin, handle in models:
                records += measure(context, name, twin, ids, handle.new_cache(), settings)
    return records


def measure(
    context: BenchContext, name: str, model: Any, ids: torch.Tensor, cache: Any, settings: dict[str, Any]
) -> list[Record]:
    """Fill the memory with copies of one cache that has read ids (1, T)."""
    one = prefilled(model, ids, cache)

    def step_of(batch: int) -> Callable[[], object]:
        many = copy.deepcopy(one)
        many.batch_repeat_interleave(batch)
        return stepper(model, ids.expand(batch, -1), many)

    def fits(batch: int) -> bool:
        try:
            step_of(batch)()
        except torch.OutOfMemoryError:
            return False
        finally:
            if context.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    batch = largest(fits, MOST)
    records = [Record("cskv", name, "largest batch", batch, "", settings)]
    if batch:
        milliseconds = time_paired({name: step_of(batch)}, device=context.device, rounds=5, warmup=1).median(name)
        records.append(Record("cskv", name, "decoding at that batch", 1e3 * batch / milliseconds, "tokens/s", settings))
    return records


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch up to `most` for which `fits`, taking it for granted that smaller ones do; 0 if none."""
    good, step = 0, 1
    while good + step <= most and fits(good + step):
        good += step
        step *= 2
    while step > 1:
        step //= 2
        if good + step <= most and fits(good + step):
            good += step
    return good
