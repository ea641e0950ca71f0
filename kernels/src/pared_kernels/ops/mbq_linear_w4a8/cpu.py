"""W4A8 on the CPU: four weights at once by table lookup, and the int8 product of the processor."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .reference import BITS, finish, quantize_tokens

# Weights of one block: in int8 half a megabyte.
BLOCK = 2**19


def mbq_linear_w4a8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product as `pared_kernels.mbq_linear_w4a8` does."""
    rows, columns = packed.shape[0], x.shape[1]
    codes, scale = quantize_tokens(x, 8)
    sums = torch.empty((x.shape[0], rows), dtype=torch.int32)
    height = max(1, min(rows, BLOCK // columns))
    for start in range(0, rows, height):
        block = packed[start : start + height].contiguous()
        index = block.view(torch.uint16).to(torch.int32).view(-1)
        weight = _table().index_select(0, index).view(torch.int8).view(-1, columns)
        sums[:, start : start + height] = torch._int_mm(codes, weight.T)
    return finish(sums, scale, scales, bias, x.dtype)


@cache
def _table() -> Tensor:
    """The four signed weights of every 16-bit pattern, as bytes of one int32."""
    patterns = torch.arange(2**16)[:, None] >> (BITS * torch.arange(4))
    return ((patterns & 15) - 8).to(torch.int8).view(torch.int32).view(-1)
