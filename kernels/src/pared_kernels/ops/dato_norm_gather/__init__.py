"""LayerNorm of selected tokens in one pass: the rows that are dropped are never read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_index, require_tensor
from ...registry import define
from . import reference

__all__ = ["dato_norm_gather"]


def _fake(x: Tensor, index: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty((x.shape[0], index.shape[1], x.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, weight, bias, ctx.eps = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, index, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor | None, None]:
    x, index, weight = ctx.saved_tensors
    samples = torch.arange(x.shape[0], device=x.device)[:, None]
    rows, grad_rows = (t if t.dtype == torch.float64 else t.float() for t in (x[samples, index], grad))
    centred = rows - rows.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + ctx.eps)
    normal = centred * inverse
    inner = grad_rows if weight is None else grad_rows * weight
    inner = inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True)
    grad_x = torch.zeros_like(x, dtype=rows.dtype).index_put((samples, index), inverse * inner, accumulate=True)
    grad_weight = None if weight is None else (grad_rows * normal).sum((0, 1)).to(weight.dtype)
    grad_bias = grad_rows.sum((0, 1)).to(x.dtype) if ctx.has_bias else None
    return grad_x.to(x.dtype), None, grad_weight, grad_bias, None


_operator = define(reference.dato_norm_gather, _fake, backward=_backward, setup_context=_setup_context)


def dato_norm_gather(
    x: Tensor, index: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Return the layer norm of the tokens `index` of `x`: LayerNorm(x)[index] (DaTo, arXiv 2501.00375, section 3).

    Args:
        x: (batch, tokens, channels), float16, bfloat16, float32 or float64, any strides.
        index: (batch, kept) int64 token indices, each in [0, tokens).
        weight, bias: (channels,) in the dtype of `x`, or None.
        eps: added to the variance, > 0.

    Returns:
        (batch, kept, channels) in the dtype of `x`, contiguous; the arithmetic is float32 (float64 for float64).
        Gradients flow to `x`, `weight` and `bias`.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes. Indices are not range-checked on a GPU.
    """
    require_tensor("x", x, 3, FLOATS)
    require_index("index", index, x.shape[0], x)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            require_tensor(name, value, 1, (x.dtype,))
            require(value.shape[0] == x.shape[2], f"length of {name}", value.shape[0], f"{x.shape[2]} (channels of x)")
    require(eps > 0, "eps", eps, "> 0")
    return _operator(x, index, weight, bias, eps)
