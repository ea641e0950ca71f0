"""Residual plus recovered tokens in one pass: x + gate * y[gather_map]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_index, require_tensor
from ...registry import define
from . import reference

__all__ = ["dato_recover_add"]


def _fake(x: Tensor, y: Tensor, gather_map: Tensor, gate: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gather_map, gate = inputs
    ctx.save_for_backward(y, gather_map, gate)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
    y, gather_map, gate = ctx.saved_tensors
    samples = torch.arange(y.shape[0], device=y.device)[:, None]
    wide = grad if grad.dtype == torch.float64 else grad.float()
    spread = wide if gate is None else wide * gate[:, None]
    grad_y = torch.zeros_like(y, dtype=wide.dtype).index_put((samples, gather_map), spread, accumulate=True)
    grad_gate = None if gate is None else (wide * y[samples, gather_map]).sum(1).to(gate.dtype)
    return grad.clone(), grad_y.to(y.dtype), None, grad_gate


_operator = define(reference.dato_recover_add, _fake, backward=_backward, setup_context=_setup_context)


def dato_recover_add(x: Tensor, y: Tensor, gather_map: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return x + gate * y[gather_map], the residual sum after pruned attention (DaTo, arXiv 2501.00375, section 3).

    Args:
        x: (batch, tokens, channels), float16, bfloat16, float32 or float64, any strides.
        y: (batch, kept, channels) in the dtype of `x`, any strides.
        gather_map: (batch, tokens) int64 positions in `y`, each in [0, kept).
        gate: (channels,), (batch, channels) or (batch, 1, channels) in the dtype of `x`, or None for 1.

    Returns:
        (batch, tokens, channels) in the dtype of `x`, contiguous, rounded once. Gradients flow to `x`, `y` and `gate`.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes. Indices are not range-checked on a GPU.
    """
    require_tensor("x", x, 3, FLOATS)
    require_tensor("y", y, 3, (x.dtype,))
    batch, tokens, channels = x.shape
    valid = f"({batch}, kept >= 1, {channels})"
    require(y.shape[0] == batch and y.shape[1] > 0 and y.shape[2] == channels, "shape of y", tuple(y.shape), valid)
    require_index("gather_map", gather_map, batch, x)
    require(gather_map.shape[1] == tokens, "length of gather_map", gather_map.shape[1], f"{tokens} (tokens of x)")
    if gate is not None:
        require_tensor("gate", gate, (1, 2, 3), (x.dtype,))
        if gate.dim() == 3:
            require(gate.shape[1] == 1, "shape of gate", tuple(gate.shape), f"({batch}, 1, {channels})")
            gate = gate[:, 0]
        valid = f"({channels},), ({batch}, {channels}) or ({batch}, 1, {channels})"
        fits = gate.shape[-1] == channels and (gate.dim() == 1 or gate.shape[0] in (1, batch))
        require(fits, "shape of gate", tuple(gate.shape), valid)
        gate = gate.expand(batch, channels)
    return _operator(x, y, gather_map, gate)
