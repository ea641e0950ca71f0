"""The product of torch with 4-bit weights, on nibbles that are codes or are masked out of codes of 3 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Shares, segments, shares, why_not
from .reference import dequantize

# Rows of the weight that are masked, or dequantised, at once: what is made of them stays in the cache.
MASKED, DEQUANTISED = 512, 256
# From this many rows of x on, by bits: dequantising to bfloat16 costs less than torch's product, which is in float32.
WIDE = {3: 48, 4: 96}


def unsupported(x: Tensor, tiles: Tensor, steps: Tensor, bits: int, group_size: int, bias: Tensor | None) -> str | None:
    """float64 is left to the reference, and so are processors without the product."""
    if x.dtype == torch.float64:
        return "it computes in float32, and x is float64"
    return why_not(len(tiles), bits, group_size)


def mbq_linear_tiled(
    x: Tensor, tiles: Tensor, steps: Tensor, bits: int, group_size: int, bias: Tensor | None
) -> Tensor:
    """Return x W^T + bias as `pared_kernels.mbq_linear_tiled` does."""
    parts = shares(bits, group_size, x.shape[1])
    if x.dtype != torch.bfloat16 or steps.dtype != torch.bfloat16 or len(x) >= WIDE[bits]:
        out = _dequantized(x, tiles, steps, bits, group_size)
    elif parts.split:
        out = _masked(x, tiles, steps, parts)
    else:
        out = _product(x.contiguous(), tiles.contiguous(), steps.contiguous(), parts.span)
    return out.to(x.dtype) if bias is None else (out + bias).to(x.dtype)


def _product(x: Tensor, nibbles: Tensor, steps: Tensor, span: int) -> Tensor:
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, nibbles, span, steps)
    return product


def _masked(x: Tensor, tiles: Tensor, steps: Tensor, parts: Shares) -> Tensor:
    """The product with 3 bits: codes of whole groups, then the bits of split ones with their weights on x."""
    edge = parts.whole * parts.span
    left = x[:, edge:]
    given = torch.cat([x[:, :edge], left / 8, left / 4, left / 2], 1)
    bits = 3 * (x.shape[1] - edge)
    out = x.new_empty((len(x), len(tiles)))
    for start, stop, height in segments(len(tiles)):
        for a in range(start, stop, MASKED):
            b = min(a + MASKED, stop)
            stored = tiles[a:b].view(-1, edge, height // 2)
            nibbles = stored.new_empty((len(stored), edge + bits, height // 2))
            torch.bitwise_and(stored, 0x77, out=nibbles[:, :edge])
            torch.bitwise_and(stored[:, :bits], 0x88, out=nibbles[:, edge:])
            out[:, a:b] = _product(given, nibbles.view(b - a, -1), steps[:, a:b].contiguous(), parts.span)
    return out


def _dequantized(x: Tensor, tiles: Tensor, steps: Tensor, bits: int, group_size: int) -> Tensor:
    """The product with dequantised rows, some at a time, in bfloat16 if x is."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    left = x.to(dtype)
    out = left.new_empty((len(x), len(tiles)))
    for start in range(0, len(tiles), DEQUANTISED):
        rows = slice(start, start + DEQUANTISED)
        weight = dequantize(tiles[rows], steps[:, rows], bits, group_size, x.shape[1], torch.float32)
        out[:, rows] = left @ weight.to(dtype)
    return out
