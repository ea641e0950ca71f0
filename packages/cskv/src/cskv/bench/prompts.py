"""Prompts that the model reads once, for all the caches that are to be filled with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from cskv.adapters import adapters_of
from cskv.cache import CSKVLayer
from cskv.capture import reading


@dataclass(frozen=True)
class ReadPrompt:
    """What every attention layer computed of a prompt of T tokens. A prompt is attended exactly by every cache, so
    this is all that any of them starts from.

    `inputs` (1, T, d) of the projections, `cos` and `sin` (1, T, D), rotated `keys` and `values` (1, H_kv, T, D), one
    for each layer; `logits` (vocabulary,) of the token behind the prompt.
    """

    inputs: list[Tensor]
    cos: list[Tensor]
    sin: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys[0].shape[2]

    def fill(self, cache: Cache) -> Cache:
        """Put the prompt into an empty cache, as the model would; returns it."""
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, CSKVLayer):
                layer.stage(self.inputs[index], self.cos[index], self.sin[index], None, "sdpa")
            cache.update(self.keys[index], self.values[index], index)
        return cache

    def to(self, dtype: torch.dtype) -> ReadPrompt:
        """The same in another dtype."""
        cast = {
            name: [one.to(dtype) for one in getattr(self, name)] for name in ("inputs", "cos", "sin", "keys", "values")
        }
        return replace(self, logits=self.logits.to(dtype), **cast)


@torch.no_grad()
def read(model: Any, ids: Tensor) -> ReadPrompt:
    """Let the unchanged model read ids (1, T)."""
    _, adapters = adapters_of(model)
    inputs: list[Tensor] = []
    cos: list[Tensor] = []
    sin: list[Tensor] = []

    def keep(_: Any, hidden_states: Tensor, one_cos: Tensor, one_sin: Tensor) -> None:
        inputs.append(hidden_states)
        cos.append(one_cos)
        sin.append(one_sin)

    cache: Any = DynamicCache(config=model.config)
    with reading(adapters, keep):
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
    keys, values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
    return ReadPrompt(inputs, cos, sin, keys, values, logits)


@torch.no_grad()
def continued(model: Any, cache: Cache, prompt: ReadPrompt, ids: Tensor) -> Tensor:
    """Logits (n, vocabulary) that predict the continuation ids (1, n), read from what `cache` holds of the prompt."""
    if ids.shape[1] == 1:
        return prompt.logits[None]
    # A cache that dropped tokens is shorter than the text; positions go on from the text.
    positions = prompt.tokens + torch.arange(ids.shape[1] - 1, device=ids.device)[None]
    logits = model(ids[:, :-1], past_key_values=cache, position_ids=positions, use_cache=True).logits[0]
    return torch.cat((prompt.logits[None], logits))
