"""Section 11 (a), (c), (d): times of a decoding step after a long past, and of a prompt, against the full cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import peak_memory, time_paired

from cskv.bench import peers
from cskv.bench.full_size import LLAMA_8B, LONGCHAT_7B, SMOLLM2, Setting, prefilled, stepper, twins
from cskv.config import CSKVConfig

BASE = CSKVConfig(k_density=0.2, v_density=0.2, init="svd")
VARIANTS = {"cskv": BASE, "cskv, int4": BASE.replace(k_bits=4, v_bits=4)}


def run(context: BenchContext) -> list[Record]:
    """Milliseconds with the full cache and with cskv; on a GPU also the memory at the peak of a step."""
    records: list[Record] = []
    for setting in context.track(list(_settings(context)), "decoding"):
        records += decoding(context, setting)
    shapes = ("Llama-3.1-8B", LLAMA_8B, 8192) if context.device.type == "cuda" else ("SmolLM2-135M", SMOLLM2, 1024)
    name, sizes, tokens = shapes
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    return records + prompt(context, Setting(name, sizes, tokens, 1, dtype))


def _settings(context: BenchContext) -> Iterator[Setting]:
    if context.device.type != "cuda":
        for tokens in (1024, 4096) if not context.full else (1024, 2048, 4096, 8000):
            yield Setting("SmolLM2-135M", SMOLLM2, tokens, 1, torch.float32)
        return
    for tokens in (8192, 32_768, 131_000):
        yield Setting("Llama-3.1-8B", LLAMA_8B, tokens, 1, torch.bfloat16)
    for tokens in (8192, 32_768):
        yield Setting("LongChat-7B", LONGCHAT_7B, tokens, 1, torch.bfloat16)


def decoding(context: BenchContext, setting: Setting) -> list[Record]:
    """Times of one step in interleaved rounds, each from the same number of cached tokens."""
    model, ids, settings = setting.model(context), setting.ids(context), setting.record("speed")
    # Where kernels run, what they win over plain torch is part of the answer.
    plain = {"cskv through torch": BASE.replace(backend="torch")} if context.device.type == "cuda" else {}
    records: list[Record] = []
    candidates = {"full cache": stepper(model, ids, prefilled(model, ids, None))}
    with twins(model, VARIANTS | plain) as models:
        for name, twin, handle in models:
            candidates[name] = stepper(twin, ids, prefilled(twin, ids, handle.new_cache()))
            records.append(Record("cskv", name, "share of the full cache", handle.stats()["ratio"], "", settings))
        if peers.QUANTIZED not in peers.missing_peers():
            cache = prefilled(model, ids, peers.quantized(model, 4))
            candidates[f"{peers.QUANTIZED}, int4"] = stepper(model, ids, cache)
        timings = time_paired(candidates, device=context.device, rounds=5, warmup=1)
        if context.device.type == "cuda":
            for name, step in candidates.items():
                peak = peak_memory(step, context.device).bytes
                records.append(Record("cskv", name, "peak of a step", peak, "B", settings))
    return records + timings.records("cskv", "full cache", settings)


def prompt(context: BenchContext, setting: Setting) -> list[Record]:
    """Times of reading a prompt: attended exactly, with A multiplied on top of keys and values."""
    model, ids = setting.model(context), setting.ids(context)
    candidates = {"full cache": partial(prefilled, model, ids, None)}
    with twins(model, VARIANTS) as models:
        for name, twin, _ in models:
            candidates[name] = partial(prefilled, twin, ids, None)
        timings = time_paired(candidates, device=context.device, rounds=5, warmup=1)
    return timings.records("cskv", "full cache", setting.record("prompt"))
