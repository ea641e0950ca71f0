"""W4A8 on the CPU: four weights at once by table lookup, and the int8 product of the processor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mbq_linear_w16.cpu import BLOCK, signed_codes
from .reference import BITS, finish, quantize_tokens


def mbq_linear_w4a8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product as `pared_kernels.mbq_linear_w4a8` does."""
    rows, columns = packed.shape[0], x.shape[1]
    codes, scale = quantize_tokens(x, 8)
    sums = torch.empty((x.shape[0], rows), dtype=torch.int32)
    height = max(1, BLOCK // columns)
    for start in range(0, rows, height):
        weight = signed_codes(packed[start : start + height], BITS)
        sums[:, start : start + height] = torch._int_mm(codes, weight.T)
    return finish(sums, scale, scales, bias, x.dtype)
