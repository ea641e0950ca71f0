"""Bytes of the cache of SmolLM2's shapes at 1k to 8k tokens: tensors that are alive, and resident memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from pared_bench import BenchContext, Record

from cskv.bench import peers
from cskv.bench.full_size import SMOLLM2, llama
from cskv.bench.memory import cache_of, fill, resident_bytes, tensor_bytes
from cskv.config import CSKVConfig

LENGTHS = (1024, 2048, 4096, 8192)
RESIDENT_LENGTH = 4096
SHAPES = SMOLLM2 | {"intermediate_size": 64, "vocab_size": 64}
"""Attention of SmolLM2-135M; what is not cached is small."""

VARIANTS: dict[str, CSKVConfig | None] = {
    "full cache": None,
    "k 1, v 1, int4": CSKVConfig(k_density=1, v_density=1, k_bits=4, v_bits=4),
    "k 0.25, v 0.5": CSKVConfig(),
    "k 0.25, v 0.5, int4": CSKVConfig(k_bits=4, v_bits=4),
    "k 0.2, v 0.2": CSKVConfig(k_density=0.2, v_density=0.2),
    "k 0.2, v 0.2, int4": CSKVConfig(k_density=0.2, v_density=0.2, k_bits=4, v_bits=4),
    "k 0.2, v 0.2, int2": CSKVConfig(k_density=0.2, v_density=0.2, k_bits=2, v_bits=2),
}


def run(context: BenchContext) -> list[Record]:
    """Bytes by length, with the ratio to the full cache; growth of a fresh process at one length, on Linux."""
    model, records = llama(SHAPES, torch.bfloat16), []
    settings = {"experiment": "memory", "shapes": "SmolLM2-135M", "dtype": "bfloat16", "weights": "random"}
    full: dict[int, int] = {}
    missing = peers.missing_peers()
    bits = () if peers.QUANTIZED in missing else (4, 2)
    for name, cache in context.track(_caches(model, bits), "bytes of tensors", len(VARIANTS) + len(bits)):
        before = 0
        for tokens in LENGTHS:
            fill(model, cache, tokens - before, torch.bfloat16, seed=before)
            before = tokens
            size = tensor_bytes(cache)
            full.setdefault(tokens, size)
            variant = {**settings, "tokens": tokens}
            records.append(Record("cskv", name, "bytes", size, "B", variant))
            records.append(Record("cskv", name, "share of the full cache", size / full[tokens], "", variant))
    if not bits:
        records.append(Record("cskv", peers.QUANTIZED, "bytes", None, "B", settings, note=missing[peers.QUANTIZED]))
    variant = {**settings, "tokens": RESIDENT_LENGTH}
    for name, config in context.track(VARIANTS.items(), "resident memory", len(VARIANTS)):
        if sys.platform == "linux":
            grown = resident_bytes(SHAPES, config, RESIDENT_LENGTH)
            records.append(Record("cskv", name, "resident growth", grown, "B", variant))
        else:
            note = f"resident memory is read on Linux alone, this is {sys.platform}"
            records.append(Record("cskv", name, "resident growth", None, "B", variant, note=note))
    return records


def _caches(model: Any, bits: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Name and empty cache of every variant, then transformers' quantised ones."""
    for name, config in VARIANTS.items():
        cache, handle = cache_of(model, config)
        yield name, cache
        if handle is not None:
            handle.remove()
    for width in bits:
        yield f"{peers.QUANTIZED}, int{width}", peers.quantized(model, width)
