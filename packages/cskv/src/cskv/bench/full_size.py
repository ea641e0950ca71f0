"""Models of full size with random weights, and one decoding step of them from a prompt that was read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pared_bench import BenchContext

from cskv.apply import CSKVHandle, apply
from cskv.config import CSKVConfig
from cskv.factors import Factors

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


def llama(shapes: dict[str, int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A Llama of these shapes with random weights, the same every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(LlamaConfig(**shapes)).eval()
        finally:
            torch.set_default_dtype(default)


@dataclass(frozen=True)
class Setting:
    """A model's shapes, a number of cached tokens and a batch."""

    name: str
    shapes: dict[str, int]
    tokens: int
    batch: int
    dtype: torch.dtype

    def record(self, experiment: str) -> dict[str, Any]:
        """Settings of a record."""
        return {
            "experiment": experiment,
            "model": self.name,
            "weights": "random",
            "tokens": self.tokens,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def model(self, context: BenchContext) -> Any:
        """A Llama of these shapes."""
        return llama(self.shapes, self.dtype, context.device)

    def ids(self, context: BenchContext) -> torch.Tensor:
        """Random token ids (batch, tokens)."""
        generator = torch.Generator().manual_seed(context.seed)
        shape = (self.batch, self.tokens)
        return torch.randint(3, self.shapes["vocab_size"], shape, generator=generator).to(context.device)


@contextmanager
def twins(model: Any, configs: dict[str, CSKVConfig]) -> Iterator[Iterator[tuple[str, Any, CSKVHandle]]]:
    """(name, model, handle) of each configuration, which takes a model object of its own; the weights are shared."""
    handles: list[CSKVHandle] = []

    def each() -> Iterator[tuple[str, Any, CSKVHandle]]:
        factors: Factors | None = None
        for name, config in configs.items():
            twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
            handle = apply(twin, config, factors)
            factors = handle.factors
            handles.append(handle)
            yield name, twin, handle

    try:
        yield each()
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def prefilled(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    """The cache after the model has read ids (batch, T)."""
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


def stepper(model: Any, ids: torch.Tensor, cache: Any) -> Callable[[], object]:
    """One decoding step that leaves the cache as long as it was; a cache that cannot do that grows by a token."""

    @torch.no_grad()
    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        if cache.is_croppable:
            cache.crop(-1)

    return step
