"""Linear layer whose weights of 3 or 4 bits lie in the blocks that torch's 4-bit product reads on a CPU.

The same layer as `mbq_linear_w16`, for bfloat16 on a CPU. `mbq_tile` puts a weight into blocks, `mbq_untile` takes it
back to the bit stream it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...bitstream import words
from ...registry import define
from ..mbq_linear_w16.reference import accumulator
from . import reference
from .layout import shares, tile, untile, why_not

__all__ = ["mbq_linear_tiled", "mbq_tile", "mbq_tiling_unsupported", "mbq_untile"]


def _fake(x: Tensor, tiles: Tensor, steps: Tensor, bits: int, group_size: int, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], tiles.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tiles, steps, ctx.bits, ctx.group_size, bias = inputs
    ctx.columns, ctx.has_bias = x.shape[1], bias is not None
    ctx.save_for_backward(tiles, steps)


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The weights are frozen: the gradient goes to the input and the bias."""
    tiles, steps = context.saved_tensors
    dtype = accumulator(gradient.dtype)
    weight = reference.dequantize(tiles, steps, context.bits, context.group_size, context.columns, dtype)
    to_bias = gradient.sum(0) if context.has_bias and context.needs_input_grad[5] else None
    return (gradient.to(dtype) @ weight.T).to(gradient.dtype), None, None, None, None, to_bias


_operator = define(reference.mbq_linear_tiled, _fake, backward=_backward, setup_context=_setup_context)


def mbq_linear_tiled(
    x: Tensor, tiles: Tensor, steps: Tensor, bits: int, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """Return y = x W^T + bias for a weight that `mbq_tile` has put into blocks, accumulated in float32.

    Args:
        x: (M, K) float16, bfloat16, float32 or float64; the result has its dtype. bfloat16 is fast.
        tiles: (N, B) uint8, of `mbq_tile`.
        steps: (S, N, 2), of `mbq_tile`: scales and offsets in bfloat16, as a dense bfloat16 layer rounds its weights.
        bits: 3 or 4.
        group_size: a multiple of 32 that divides K.
        bias: (N,), or None.

    Returns:
        (M, N). A gradient flows to x and bias; the weights are constants.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes.
    """
    require_tensor("x", x, 2, FLOATS)
    require_tensor("tiles", tiles, 2, (torch.uint8,))
    require_tensor("steps", steps, 3, FLOATS)
    columns, rows = x.shape[1], tiles.shape[0]
    _require_group(bits, group_size, columns)
    parts = shares(bits, group_size, columns)
    count = parts.whole * parts.span // 2
    require(tiles.shape[1] == count, "bytes of tiles", tiles.shape[1], f"{count} for {columns} columns of x")
    shape = (parts.scales, rows, 2)
    require(steps.shape == shape, "shape of steps", tuple(steps.shape), str(shape))
    if bias is not None:
        require_tensor("bias", bias, 1, FLOATS)
        require(bias.shape[0] == rows, "length of bias", bias.shape[0], str(rows))
    return _operator(x, tiles, steps, bits, group_size, bias)


def mbq_tile(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return (tiles, steps) of a weight as `mbq_linear_w16` takes it: the same bytes, and scales in bfloat16.

    Args:
        packed: (N, K * bits / 32) int32, on the CPU.
        scales: (N, G).
        zeros: (ceil(N * bits / 32), G) int32, or None: 2^(bits - 1).
        bits: 3 or 4.
        group_size: K / G.

    Raises:
        ValueError: for a weight that `mbq_tiling_unsupported` gives a reason for, or wrong shapes.
    """
    require_tensor("packed", packed, 2, (torch.int32,))
    require_tensor("scales", scales, 2, FLOATS)
    reason = mbq_tiling_unsupported(len(packed), bits, group_size)
    require(reason is None, "bits, rows, group_size", (bits, len(packed), group_size), f"what fits: {reason}")
    columns = scales.shape[1] * group_size
    shape = (len(scales), words(columns, bits))
    require(packed.shape == shape, "shape of packed", tuple(packed.shape), str(shape))
    require(packed.device.type == "cpu", "device of packed", packed.device, "the CPU")
    return tile(packed, scales, zeros, bits, group_size)


def mbq_untile(tiles: Tensor, steps: Tensor, bits: int, group_size: int, columns: int) -> Tensor:
    """Return the bit stream int32 (N, K * bits / 32) that `mbq_tile` was given, bit for bit; K is `columns`."""
    require_tensor("tiles", tiles, 2, (torch.uint8,))
    require_tensor("steps", steps, 3, FLOATS)
    _require_group(bits, group_size, columns)
    return untile(tiles, steps, bits, group_size, columns)


def mbq_tiling_unsupported(rows: int, bits: int, group_size: int) -> str | None:
    """Return why a weight of `rows` rows cannot be put into blocks on this machine, or None where it can."""
    return why_not(rows, bits, group_size)


def _require_group(bits: int, group_size: int, columns: int) -> None:
    require(bits in (3, 4), "bits", bits, "3 or 4")
    valid = f"a multiple of 32 that divides the {columns} columns"
    require(group_size > 0 and group_size % 32 == 0 and columns % group_size == 0, "group_size", group_size, valid)
