"""A linear layer with weights in blocks: put them back in order, dequantise, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mbq_linear_w16.reference import accumulator
from .layout import codes, shares


def mbq_linear_tiled(
    x: Tensor, tiles: Tensor, steps: Tensor, bits: int, group_size: int, bias: Tensor | None
) -> Tensor:
    """Return x W^T + bias, as `pared_kernels.mbq_linear_tiled`."""
    weight = dequantize(tiles, steps, bits, group_size, x.shape[1], accumulator(x.dtype))
    product = x.to(weight.dtype) @ weight
    return (product if bias is None else product + bias.to(weight.dtype)).to(x.dtype)


def dequantize(tiles: Tensor, steps: Tensor, bits: int, group_size: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the transposed weight (K, N) in `dtype`, computed in it; also of some blocks of rows alone."""
    parts, rows = shares(bits, group_size, columns), len(tiles)
    scale, offset = steps.to(dtype).unbind(-1)
    shift = offset[: parts.whole] - 8 * scale[: parts.whole]
    if parts.split:
        first, second, third = offset[parts.whole :].view(3, -1, rows)
        rest = first / 8 + second / 4 + third / 2 - 7 * scale[parts.whole : parts.whole + parts.split]
        shift = torch.cat([shift, rest])
    weight = codes(tiles, bits, group_size, columns).to(dtype).view(-1, parts.span, rows)
    return weight.mul_(scale[: len(weight), None]).add_(shift[:, None]).view(columns, rows)
