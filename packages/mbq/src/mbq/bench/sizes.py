"""Bytes on disk and resident, and time per token, of SmolLM2-135M packed, beside bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import time_paired

from mbq.config import MBQConfig
from mbq.export import size_on_disk
from mbq.quantize import apply

VARIANTS: dict[str, dict[str, Any]] = {
    "W3A16": {"w_bits": 3, "group_size": 64},
    "W4A16": {"w_bits": 4, "group_size": 64},
    "W4A8": {"w_bits": 4, "a_bits": 8},
}


def tensor_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def run(context: BenchContext) -> list[Record]:
    """Sizes and decoding speed; weights rounded to nearest, since their values do not matter here."""
    from pared_zoo.real import smollm2

    model, _ = smollm2()
    model.to(context.device, torch.bfloat16)
    settings = {"experiment": "size and speed of SmolLM2-135M", "dtype": "bfloat16"}
    steps: dict[str, Callable[[], object]] = {"bfloat16": _step(model)}
    records = _sizes("bfloat16", model, settings)
    for name, options in VARIANTS.items():
        twin = copy.deepcopy(model)
        handle = apply(twin, MBQConfig(method="rtn", **options), [], restore="none")
        records += _sizes(name, twin, settings)
        bits = handle.stats()["bits_per_weight"]
        records.append(Record("mbq", name, "bits per weight", bits, "", settings))
        steps[name] = _step(twin)
    timings = time_paired(steps, device=context.device, rounds=5, warmup=1)
    return records + timings.records("mbq", "bfloat16", settings)


def _sizes(name: str, model: Any, settings: dict[str, Any]) -> list[Record]:
    return [
        Record("mbq", name, "on disk", size_on_disk(model), "B", settings),
        Record("mbq", name, "resident", tensor_bytes(model), "B", settings),
    ]


def _step(model: Any) -> Callable[[], object]:
    """Decode one token behind 64."""
    ids = torch.arange(64, device=model.device)[None] + 100
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values

    @torch.no_grad()
    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step
