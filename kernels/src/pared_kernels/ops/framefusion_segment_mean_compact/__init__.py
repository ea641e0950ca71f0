"""Mean of each group of tokens, written to its place in the shortened sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_index, require_tensor
from ...registry import define
from . import reference

__all__ = ["framefusion_segment_mean_compact"]


def _fake(hidden: Tensor, order: Tensor, seg_start: Tensor, out_index: Tensor, weight: Tensor | None) -> Tensor:
    return hidden.new_empty((hidden.shape[0], out_index.shape[1], hidden.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, order, seg_start, out_index, weight = inputs
    ctx.shape = hidden.shape
    ctx.save_for_backward(order, seg_start, out_index, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    order, seg_start, out_index, weight = ctx.saved_tensors
    batch, tokens, _ = ctx.shape
    place = torch.arange(tokens, device=grad.device).expand(batch, -1).contiguous()
    segment = torch.searchsorted(seg_start[:, :-1].contiguous(), place, right=True) - 1
    inside = (segment >= 0) & (place < seg_start[:, -1:])
    segment = segment.clamp(min=0)
    wide = grad if grad.dtype == torch.float64 else grad.float()
    weights = wide.new_ones((batch, tokens)) if weight is None else weight.gather(1, order).to(wide.dtype)
    weights = weights * inside
    totals = weights.new_zeros(out_index.shape).scatter_add(1, segment, weights)
    share = weights / totals.gather(1, segment).clamp(min=torch.finfo(wide.dtype).tiny)
    row = out_index.gather(1, segment)[..., None].expand(ctx.shape)
    placed = wide.gather(1, row) * share[..., None]
    grad_hidden = torch.zeros_like(placed).scatter(1, order[..., None].expand_as(placed), placed)
    return grad_hidden.to(grad.dtype), None, None, None, None


_operator = define(reference.framefusion_segment_mean_compact, _fake, backward=_backward, setup_context=_setup_context)


def framefusion_segment_mean_compact(
    hidden: Tensor, order: Tensor, seg_start: Tensor, out_index: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Average the tokens of each segment and write the means as a shorter sequence (FrameFusion, arXiv 2501.01986).

    Row b of the result is made of segments s of `order[b]`, the places seg_start[b, s] to seg_start[b, s + 1]; the mean
    of their tokens goes to row out_index[b, s]. Tokens before the first or after the last segment are left out.

    Args:
        hidden: (batch, tokens, channels), float16, bfloat16, float32 or float64, any strides.
        order: (batch, tokens) int64, a permutation of the tokens in each row.
        seg_start: (batch, segments + 1) int64, ascending in [0, tokens]; equal neighbours are an empty segment.
        out_index: (batch, segments) int64, a permutation of [0, segments) in each row.
        weight: (batch, tokens) float32 (float64 with float64) weight of each token, above 0, or None for a plain mean.

    Returns:
        (batch, segments, channels) in the dtype of `hidden`, contiguous, zero for an empty segment. Members are added
        in order and in float32 (float64 for float64), so that the result is the same in every run. Gradients flow to
        `hidden`.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes. Indices are not range-checked on a GPU.
    """
    require_tensor("hidden", hidden, 3, FLOATS)
    batch, tokens = hidden.shape[:2]
    for name, index in (("order", order), ("seg_start", seg_start), ("out_index", out_index)):
        require_index(name, index, batch, hidden)
    require(order.shape[1] == tokens, "length of order", order.shape[1], f"{tokens} (tokens of hidden)")
    wanted = out_index.shape[1] + 1
    require(seg_start.shape[1] == wanted, "length of seg_start", seg_start.shape[1], f"{wanted} (out_index and one)")
    if weight is not None:
        require_tensor("weight", weight, 2, (torch.float64 if hidden.dtype == torch.float64 else torch.float32,))
        shape = (batch, tokens)
        require(tuple(weight.shape) == shape, "shape of weight", tuple(weight.shape), f"{shape}, as hidden")
        weight = weight.detach()
    return _operator(hidden, order, seg_start, out_index, weight)
