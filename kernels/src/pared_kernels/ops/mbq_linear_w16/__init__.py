"""Linear layer whose weights are packed in 2 to 8 bits with a scale (and zero point) per group of input channels.

The decoding kernel of MBQ (arXiv 2412.19509, section 4.3): bytes of packed weights instead of 16-bit ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...bitstream import words
from ...registry import define
from . import reference

__all__ = ["mbq_linear_w16"]


def _fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zeros, ctx.bits, ctx.group_size, bias = inputs
    ctx.columns, ctx.has_bias = x.shape[1], bias is not None
    ctx.save_for_backward(packed, scales, zeros)


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The weights are frozen: the gradient goes to the input and the bias."""
    packed, scales, zeros = context.saved_tensors
    dtype = reference.accumulator(gradient.dtype)
    weight = reference.dequantize(packed, scales, zeros, context.bits, context.group_size, context.columns, dtype)
    to_bias = gradient.sum(0) if context.has_bias and context.needs_input_grad[6] else None
    return (gradient.to(dtype) @ weight).to(gradient.dtype), None, None, None, None, None, to_bias


_operator = define(reference.mbq_linear_w16, _fake, backward=_backward, setup_context=_setup_context)


def mbq_linear_w16(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Return y = x W^T + bias with W[n, k] = (u[n, k] - z[n, k / g]) s[n, k / g], accumulated in float32.

    Args:
        x: (M, K) float16, bfloat16, float32 or float64; the result has its dtype. K is a multiple of 32.
        packed: (N, K * bits / 32) int32, the codes u of a row as a dense bit stream (`pared_kernels.bitstream`).
        scales: (N, G) float16, bfloat16 or float32, G = K / group_size.
        zeros: (ceil(N * bits / 32), G) int32, the zero points as a bit stream along N; None: 2^(bits - 1).
        bits: 2 to 8. On a GPU, M = 1 has a kernel of its own.
        group_size: a multiple of 32 that divides K; K itself for one scale a row.
        bias: (N,), or None.

    Returns:
        (M, N). A gradient flows to x and bias; the packed weights are constants.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes.
    """
    require_tensor("x", x, 2, FLOATS)
    require_tensor("packed", packed, 2, (torch.int32,))
    require_tensor("scales", scales, 2, FLOATS)
    require(2 <= bits <= 8, "bits", bits, "2 to 8")
    (rows, count), columns = packed.shape, x.shape[1]
    valid = f"a multiple of 32 that divides the {columns} columns of x"
    require(group_size > 0 and group_size % 32 == 0 and columns % group_size == 0, "group_size", group_size, valid)
    require(count == words(columns, bits), "words of packed", count, f"{words(columns, bits)} for {columns} columns")
    groups = columns // group_size
    require(scales.shape == (rows, groups), "shape of scales", tuple(scales.shape), str((rows, groups)))
    if zeros is not None:
        require_tensor("zeros", zeros, 2, (torch.int32,))
        shape = (words(rows, bits), groups)
        require(zeros.shape == shape, "shape of zeros", tuple(zeros.shape), str(shape))
    if bias is not None:
        require_tensor("bias", bias, 1, FLOATS)
        require(bias.shape[0] == rows, "length of bias", bias.shape[0], str(rows))
    return _operator(x, packed, scales, zeros, bits, group_size, bias)
