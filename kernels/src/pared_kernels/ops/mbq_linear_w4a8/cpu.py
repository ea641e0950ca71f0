"""W4A8 on the CPU: a byte holds two weights, which masks take apart, and the int8 product of the processor."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import BITS, finish, quantize_tokens

# Weights of one block: in int8 a megabyte.
BLOCK = 2**20


def mbq_linear_w4a8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product as `pared_kernels.mbq_linear_w4a8` does."""
    rows, columns = packed.shape[0], x.shape[1]
    codes, scale = quantize_tokens(x, 8)
    even, odd = codes[:, ::2].contiguous(), codes[:, 1::2].contiguous()
    stored = packed.contiguous().view(torch.uint8)
    sums = torch.empty((x.shape[0], rows), dtype=torch.int32)
    height = max(1, BLOCK // columns)
    for start in range(0, rows, height):
        block = stored[start : start + height]
        low, high = (block & 15).view(torch.int8), (block >> 4).view(torch.int8)
        sums[:, start : start + height] = torch._int_mm(even, low.T) + torch._int_mm(odd, high.T)
    # Codes are stored plus 8.
    sums -= 2 ** (BITS - 1) * codes.sum(-1, keepdim=True, dtype=torch.int32)
    return finish(sums, scale, scales, bias, x.dtype)
