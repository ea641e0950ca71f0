"""Caches of other methods after a prompt: transformers' quantised ones, kvpress's, and the first and latest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from pared_hooks import DecoderView, Patch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from cskv.bench.arms import SINKS

QUANTIZED, KVPRESS = "transformers QuantizedCache", "kvpress"

GROUP, RESIDUAL = 64, 128
"""Values that share a scale, and latest tokens that are not quantised: the defaults of transformers."""


def missing_peers() -> dict[str, str]:
    """Those of `QUANTIZED` and `KVPRESS` that cannot run here, and why."""
    missing = {}
    if not (find_spec("optimum") and find_spec("optimum.quanto")):
        missing[QUANTIZED] = "optimum-quanto is not installed: pip install 'cskv[bench]'"
    if not find_spec("kvpress"):
        missing[KVPRESS] = "kvpress is not installed: pip install 'cskv[bench]'"
    return missing


@torch.no_grad()
def read_prompt(model: Any, prompt: Tensor, cache: Cache) -> Cache:
    """The cache after the prompt (1, T) was read into it."""
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def full(model: Any, prompt: Tensor) -> Cache:
    """Every token, as the model computed it."""
    return read_prompt(model, prompt, DynamicCache(config=model.config))


def empty_quantized(model: Any, bits: int) -> Cache:
    """transformers' `QuantizedCache` by optimum-quanto, 2 or 4 bits."""
    return QuantizedCache("quanto", model.config, nbits=bits, q_group_size=GROUP, residual_length=RESIDUAL)


def quantized(model: Any, prompt: Tensor, bits: int) -> Cache:
    """A quantised cache after the prompt."""
    return read_prompt(model, prompt, empty_quantized(model, bits))


def first_and_latest(model: Any, prompt: Tensor, share: float) -> Cache:
    """The first tokens and the latest ones, `share` of all, as StreamingLLM keeps them but at their own positions."""
    cache = full(model, prompt)
    kept = max(round(share * prompt.shape[1]), SINKS + 1)
    recent = prompt.shape[1] - (kept - SINKS)
    for layer in cache.layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)
            setattr(layer, name, torch.cat((states[:, :, :SINKS], states[:, :, recent:]), dim=2))
    return cache


def pressed(model: Any, prompt: Tensor, presses: Sequence[Any]) -> Cache:
    """What kvpress's `presses` leave of the prompt, one after another.

    kvpress's own hooks ask for an argument that attentions of this transformers no longer get; its methods do not.
    """
    cache: Any = DynamicCache(config=model.config)

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer = cache.layers[module.layer_idx]
        for press in presses:
            layer.keys, layer.values = press.compress(
                module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs
            )

    patch = Patch("cskv.bench")
    try:
        with patch:
            for layer in DecoderView.of(model).layers:
                patch.add_hook(layer.attention, "forward", hook, with_kwargs=True)
        return read_prompt(model, prompt, cache)
    finally:
        patch.remove()


@torch.no_grad()
def continued(model: Any, cache: Cache, past: int, ids: Tensor) -> Tensor:
    """Logits (n, vocabulary) of ids (1, n) that follow a text of `past` tokens, of which `cache` holds what it does."""
    # A cache that dropped tokens is shorter than the text; positions go on from the text.
    positions = past + torch.arange(ids.shape[1], device=ids.device)[None]
    return model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits[0]
