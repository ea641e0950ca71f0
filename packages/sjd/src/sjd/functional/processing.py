"""Logits to the distribution that is sampled from: guidance, allowed tokens, temperature, top-k, top-p."""

from __future__ import annotations

import torch
from torch import Tensor


def process_rows(
    logits: Tensor,
    *,
    guidance: tuple[float, Tensor] | tuple[Tensor, float] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    allowed: Tensor | slice | None = None,
    forced: Tensor | None = None,
) -> Tensor:
    """Return the distributions (R, V) of R rows, float32, or float64 for float64 logits.

    In this order: guidance u + s (c - u), mask of allowed tokens, temperature, top-k, top-p, softmax. What is returned
    is never processed again: the residual of two processed distributions is sampled from as it is.

    Args:
        logits: (R, V), of the conditional rows when guided.
        guidance: the scale s and the logits (R, V) of the unconditional rows.
        temperature: above 0.
        top_k: keep the tokens whose logit is at least the k-th largest, ties included; None or 0 keeps all.
        top_p: keep the fewest most likely tokens whose mass is at least this; None or 1 keeps all.
        allowed: (V,) bool or a slice of the vocabulary.
        forced: (R,) int64; the rows with a token of at least 0 become one-hot at it.

    Raises ValueError for a temperature, top_k or top_p out of range.
    """
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if guidance is not None:
        first, second = guidance
        scale, unconditional = (second, first) if isinstance(first, Tensor) else (first, second)
        assert isinstance(unconditional, Tensor)
        logits = guide(logits, unconditional.to(logits.dtype), float(scale))
    if allowed is not None:
        logits = masked(logits, allowed)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; valid: above 0")
    if temperature != 1:
        logits = logits / temperature
    if top_k:
        if top_k < 0:
            raise ValueError(f"top_k is {top_k}; valid: None or at least 0")
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p != 1:
        if not 0 < top_p < 1:
            raise ValueError(f"top_p is {top_p}; valid: None or a share in (0, 1]")
        logits = nucleus(logits, top_p)
    probs = logits.softmax(-1)
    return probs if forced is None else with_forced(probs, forced)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return u + s (c - u), both (..., V); a token that is impossible in both stays impossible."""
    guided = unconditional + scale * (conditional - unconditional)
    return torch.where(conditional == unconditional, conditional, guided)


def masked(logits: Tensor, allowed: Tensor | slice) -> Tensor:
    """Return the logits (..., V) with -inf outside of `allowed`, (V,) bool or a slice."""
    if isinstance(allowed, slice):
        inside = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        inside[allowed] = True
        allowed = inside
    return logits.masked_fill(~allowed, -torch.inf)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return the logits (..., V) with -inf outside of the fewest most likely tokens of mass `top_p`, at least one."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    drop = before >= top_p
    drop[..., 0] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def with_forced(probs: Tensor, forced: Tensor) -> Tensor:
    """Return `probs` (..., V) with one-hot rows where `forced` (...,) is a token of at least 0."""
    one_hot = torch.zeros_like(probs).scatter_(-1, forced.clamp(min=0)[..., None], 1.0)
    return torch.where((forced >= 0)[..., None], one_hot, probs)
