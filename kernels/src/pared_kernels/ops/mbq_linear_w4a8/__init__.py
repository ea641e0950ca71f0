"""Linear layer of 4-bit weights and 8-bit activations with an integer product (W4A8).

Weights are symmetric with one scale a row, activations symmetric with one scale a token, found as they come
(MBQ, arXiv 2412.19509, section 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...registry import define
from ..mbq_linear_w16.reference import accumulator, dequantize
from . import reference

__all__ = ["mbq_linear_w4a8"]


def _fake(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, bias = inputs
    ctx.columns, ctx.has_bias = x.shape[1], bias is not None
    ctx.save_for_backward(packed, scales)


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the rounding of the activations; the weights are frozen."""
    packed, scales = context.saved_tensors
    dtype = accumulator(gradient.dtype)
    weight = dequantize(packed, scales, None, reference.BITS, context.columns, context.columns, dtype)
    to_bias = gradient.sum(0) if context.has_bias and context.needs_input_grad[3] else None
    return (gradient.to(dtype) @ weight).to(gradient.dtype), None, None, to_bias


_operator = define(reference.mbq_linear_w4a8, _fake, backward=_backward, setup_context=_setup_context)


def mbq_linear_w4a8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return y[m, n] = sx[m] sw[n] sum_k qx[m, k] qw[n, k] + bias[n]; the sum is exact, in int32.

    qx = round(x / sx) with sx = max |x| of the token / 127; qw = u - 8 with the 4-bit codes u of `packed`.

    Args:
        x: (M, K) float16, bfloat16, float32 or float64; the result has its dtype. K is a multiple of 32.
        packed: (N, K / 8) int32, a dense bit stream per row (`pared_kernels.bitstream`).
        scales: (N, 1) float16, bfloat16 or float32.
        bias: (N,), or None.

    Returns:
        (M, N). A gradient flows to x (straight through the rounding) and bias.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes.
    """
    require_tensor("x", x, 2, FLOATS)
    require_tensor("packed", packed, 2, (torch.int32,))
    require_tensor("scales", scales, 2, FLOATS)
    rows, columns = packed.shape[0], x.shape[1]
    require(columns % 32 == 0, "columns of x", columns, "a multiple of 32")
    require(
        packed.shape[1] == columns // 8, "words of packed", packed.shape[1], f"{columns // 8} for {columns} columns"
    )
    require(scales.shape == (rows, 1), "shape of scales", tuple(scales.shape), str((rows, 1)))
    if bias is not None:
        require_tensor("bias", bias, 1, FLOATS)
        require(bias.shape[0] == rows, "length of bias", bias.shape[0], str(rows))
    return _operator(x, packed, scales, bias)
