"""Section 11: time of one decoding step after a long past, against the full cache; full-size shapes on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import peak_memory, time_paired

from cskv.apply import apply
from cskv.bench import peers
from cskv.config import CSKVConfig

DENSITY = 0.2
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
LONGCHAT_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
}
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Setting:
    """A model's shapes, a number of cached tokens and a batch."""

    name: str
    shapes: dict[str, int]
    tokens: int
    batch: int
    dtype: torch.dtype


def run(context: BenchContext) -> list[Record]:
    """Milliseconds of a decoding step with the full cache and with CSKV; on a GPU also the memory at its peak."""
    records: list[Record] = []
    for setting in context.track(list(_settings(context)), "decoding"):
        records += measure(context, setting)
    return records


def _settings(context: BenchContext) -> Iterator[Setting]:
    if context.device.type != "cuda":
        for tokens in (1024, 4096) if not context.full else (1024, 2048, 4096, 8000):
            yield Setting("SmolLM2-135M", SMOLLM2, tokens, 1, torch.float32)
        return
    for tokens in (8192, 32768):
        yield Setting("Llama-3.1-8B", LLAMA_8B, tokens, 1, torch.bfloat16)
        yield Setting("LongChat-7B", LONGCHAT_7B, tokens, 1, torch.bfloat16)


def measure(context: BenchContext, setting: Setting) -> list[Record]:
    """Times of one step in interleaved rounds, each from the same number of cached tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(), torch.device(context.device):
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(setting.dtype)
        try:
            model = LlamaForCausalLM(LlamaConfig(**setting.shapes)).eval()
        finally:
            torch.set_default_dtype(default)
    generator = torch.Generator().manual_seed(context.seed)
    ids = torch.randint(3, setting.shapes["vocab_size"], (setting.batch, setting.tokens), generator=generator)
    ids = ids.to(context.device)
    settings = {
        "experiment": "speed",
        "model": setting.name,
        "weights": "random",
        "tokens": setting.tokens,
        "batch": setting.batch,
        "dtype": str(setting.dtype).removeprefix("torch."),
    }
    base = CSKVConfig(k_density=DENSITY, v_density=DENSITY, init="svd")
    variants = {"cskv": base, "cskv, int4": base.replace(k_bits=4, v_bits=4)}
    records: list[Record] = []
    candidates = {"full cache": _stepper(model, ids, _prefilled(model, ids, None))}
    factors = None
    for name, config in variants.items():
        # Another model object with the same weights: one model takes one configuration.
        twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        handle = apply(twin, config, factors)
        factors = handle.factors
        candidates[name] = _stepper(twin, ids, _prefilled(twin, ids, handle.new_cache()))
        records.append(Record("cskv", name, "share of the full cache", handle.stats()["ratio"], "", settings))
    if peers.QUANTIZED not in peers.missing_peers():
        cache = _prefilled(model, ids, peers.quantized(model, 4))
        candidates[f"{peers.QUANTIZED}, int4"] = _stepper(model, ids, cache)
    timings = time_paired(candidates, device=context.device, rounds=5, warmup=1)
    records += timings.records("cskv", "full cache", settings)
    if context.device.type == "cuda":
        for name, step in candidates.items():
            records.append(
                Record("cskv", name, "peak of a step", peak_memory(step, context.device).bytes, "B", settings)
            )
    return records


@torch.no_grad()
def _prefilled(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


def _stepper(model: Any, ids: torch.Tensor, cache: Any) -> Callable[[], object]:
    """One decoding step that leaves the cache as long as it was; a cache that cannot do that grows by a token."""

    @torch.no_grad()
    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        if cache.is_croppable:
            cache.crop(-1)

    return step
