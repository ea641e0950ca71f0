"""Quality at the speed of a prompt: what step-by-step decoding with CSKV would give, for a whole text at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pared_hooks import Patch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from cskv.adapters import attention_function
from cskv.cache import Applied, FactorBuffers, LayerSpec
from cskv.config import CSKVConfig
from cskv.errors import UnsupportedAttentionError
from cskv.factors import Factors, check_factors
from cskv.functional import bibranch_attention, fake_quantize
from cskv.plan import LayerPlan, plan_layers
from cskv.storage import QuantizationPlan

Logits = Callable[[Tensor, int], Tensor]
"""Logits (1, T, vocabulary) of ids (1, T), when those from `prefix` on are decoded one by one."""


@contextmanager
def decoding_at_once(
    model: nn.Module, config: CSKVConfig, factors: Factors | Sequence[Any], prefix: int
) -> Iterator[None]:
    """Inside the block, `model(ids, use_cache=False)` gives at every place t >= prefix the logits of decoding.

    Every row attends as `functional.bibranch_attention` says after an exact prompt of `prefix` tokens. Latents are
    quantised in whole groups of tokens; tokens of an unfinished group at the end are not. Sequences must not be padded.
    Takes memory for scores of a block of queries, nothing else that grows with the square of the length.

    Raises what `apply` raises for model and factors, and `UnsupportedAttentionError` for a model whose attention
    cannot be exchanged.
    """
    view, plans = plan_layers(model, config)
    checked = check_factors(factors, plans)
    specs = {
        id(plan.adapter.module): LayerSpec(plan, FactorBuffers(plan, checked[plan.index]), config, Applied())
        for plan in plans
    }
    staged: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    patch = Patch("cskv.evaluate")
    try:
        with patch:
            for plan in plans:
                patch.add_hook(plan.adapter.module, "forward_pre", _stage(plan, staged), with_kwargs=True)
            own = view.config._attn_implementation
            attention = _attention(own, specs, staged, prefix)
            patch.set_attention(view.root, "cskv_at_once", attention, ALL_MASK_ATTENTION_FUNCTIONS[own])
        yield
    finally:
        patch.remove()


def _stage(plan: LayerPlan, staged: dict[int, tuple[Tensor, Tensor, Tensor]]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = plan.adapter.arguments(args, kwargs)
        staged[id(module)] = (arguments["hidden_states"], *arguments["position_embeddings"])

    return hook


def _attention(
    own: str, specs: dict[int, LayerSpec], staged: dict[int, tuple[Tensor, Tensor, Tensor]], prefix: int
) -> Any:
    """The bi-branch attention for the layers of `specs`; other layers go on with the implementation `own`."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> Any:
        spec = specs.get(id(module))
        if spec is None:
            return attention_function(own, module)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        _refuse_extras(module, kwargs)
        k_hat, v_hat = rebuilt_whole(spec, key, value, *staged.pop(id(module)))
        output = bibranch_attention(
            query,
            key,
            value,
            k_hat,
            v_hat,
            window=spec.config.window,
            policy=spec.config.window_policy,
            prefix=prefix,
            scale=scaling,
        )
        return output.transpose(1, 2).contiguous(), None

    return attention


def _refuse_extras(module: Any, kwargs: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttentionError(
                f"{type(module).__name__} attends with {name}, which evaluation at once cannot do; decode step by step"
            )


def rebuilt_whole(
    spec: LayerSpec, key: Tensor, value: Tensor, hidden_states: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """k_hat and v_hat (B, H_kv, T, D) of all tokens, from the inputs (B, T, d) of the projections."""
    latent_k, latent_v = spec.latents(hidden_states)
    latent_k = key.transpose(1, 2).flatten(2) if latent_k is None else latent_k
    latent_v = value.transpose(1, 2).flatten(2) if latent_v is None else latent_v
    k_hat = spec.keys(_quantised(latent_k, spec.plan.k_quantization), lambda: (cos, sin))
    return k_hat, spec.values(_quantised(latent_v, spec.plan.v_quantization))


def _quantised(latents: Tensor, plan: QuantizationPlan | None) -> Tensor:
    """Latents (B, T, C) after quantisation of the groups of tokens that are whole."""
    whole = 0 if plan is None else latents.shape[1] - latents.shape[1] % plan.tokens
    if plan is None or whole == 0:
        return latents
    rounded = fake_quantize(
        latents[:, :whole], bits=plan.bits, axis=plan.axis, group_size=plan.group_size, zero_point=plan.zero_point
    )
    return torch.cat((rounded, latents[:, whole:]), dim=1)


def full_cache(model: Any) -> Logits:
    """The model as it is."""
    return lambda ids, prefix: model(ids, use_cache=False).logits


def cskv_cache(model: Any, config: CSKVConfig, factors: Factors) -> Logits:
    """CSKV with these factors."""

    def logits(ids: Tensor, prefix: int) -> Tensor:
        with decoding_at_once(model, config, factors, prefix):
            return model(ids, use_cache=False).logits

    return logits


@torch.no_grad()
def perplexity(logits: Logits, texts: Sequence[Tensor], prefix: int) -> float:
    """exp of the mean negative log-likelihood of all tokens after the first `prefix`, teacher-forced."""
    total, count = 0.0, 0
    for ids in texts:
        rows = logits(ids, prefix)[0, prefix - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(rows, ids[0, prefix:], reduction="sum"))
        count += ids.shape[1] - prefix
    return math.exp(total / count)


def sequences(ids: Tensor, count: int, length: int) -> list[Tensor]:
    """`count` sequences (1, length), evenly spread over the text. Raises ValueError when it is too short."""
    if count < 1 or length < 1 or count * length > len(ids):
        raise ValueError(f"count = {count}, length = {length}: the text has {len(ids)} tokens")
    stride = (len(ids) - length) // max(count - 1, 1)
    return [ids[place * stride : place * stride + length][None] for place in range(count)]
