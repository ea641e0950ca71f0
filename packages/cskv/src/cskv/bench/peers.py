"""Caches of other methods: transformers' quantised ones, what kvpress leaves, the first and latest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from pared_hooks import DecoderView
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from cskv.bench.prompts import ReadPrompt

SINKS = 4
"""First tokens that token dropping keeps, as StreamingLLM does."""

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


def full(model: Any) -> Cache:
    """An empty cache of every token as the model computes it."""
    return DynamicCache(config=model.config)


def quantized(model: Any, bits: int) -> Cache:
    """An empty `QuantizedCache` of transformers by optimum-quanto, 2 or 4 bits."""
    return QuantizedCache("quanto", model.config, nbits=bits, q_group_size=GROUP, residual_length=RESIDUAL)


def first_and_latest(model: Any, prompt: ReadPrompt, share: float) -> Cache:
    """The first tokens and the latest ones, `share` of all, as StreamingLLM keeps them but at their own positions."""
    kept = max(round(share * prompt.tokens), SINKS + 1)
    recent = prompt.tokens - (kept - SINKS)
    cache: Any = prompt.fill(full(model))
    for layer in cache.layers:
        layer.keys, layer.values = (
            torch.cat((states[:, :, :SINKS], states[:, :, recent:]), dim=2) for states in (layer.keys, layer.values)
        )
    return cache


@torch.no_grad()
def pressed(model: Any, prompt: ReadPrompt, presses: Sequence[Any]) -> Cache:
    """What kvpress's `presses` leave of the prompt, one after another.

    kvpress's own hooks ask for an argument that attentions of this transformers no longer get; its methods do not.
    """
    cache: Any = prompt.fill(full(model))
    for index, (layer, view) in enumerate(zip(cache.layers, DecoderView.of(model).layers, strict=True)):
        # Some methods write into what they are given, and the prompt serves other caches as well.
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        inputs = prompt.inputs[index]
        arguments = {"hidden_states": inputs, "position_embeddings": (prompt.cos[index], prompt.sin[index])}
        for press in presses:
            layer.keys, layer.values = press.compress(view.attention, inputs, layer.keys, layer.values, None, arguments)
    return cache
