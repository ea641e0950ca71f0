"""Packed linear layer on the CPU: several codes at once by table lookup, a cache-sized block of rows at a time.

Dequantising code by code takes a dozen passes over the weight. Here a few bits select a row of a small table that holds
the float32 values of all codes in them, and a block is multiplied while it is still in the cache.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .reference import zero_points

# Codes of one lookup, for each width: a divisor of 32 whose bits keep the table within the cache.
CODES = {2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1}
# A row of the table is gathered as one element.
ELEMENT = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}
# Weights of one block, in float32 a megabyte.
BLOCK = 2**18
# From this many rows of x on, a product in bfloat16 repays the conversion of the block.
WIDE = 16


def unsupported(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None,
) -> str | None:
    """float64 is left to the reference."""
    return "it computes in float32, and x is float64" if x.dtype == torch.float64 else None


def mbq_linear_w16(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    """Return x W^T + bias as `pared_kernels.mbq_linear_w16` does."""
    (many, columns), rows = x.shape, packed.shape[0]
    codes, groups = CODES[bits], columns // group_size
    lookups, periods = 32 // codes, columns // 32
    table = _table(bits, codes, zeros is None)
    # A block comes out as (rows, lookup, period, code): x is put into the same order once.
    ordered = x.to(torch.float32).reshape(many, periods, lookups, codes).transpose(1, 2).reshape(many, columns)
    narrow = x.dtype if many >= WIDE and x.dtype == torch.bfloat16 else torch.float32
    ordered = ordered.to(narrow)
    steps = scales.to(torch.float32)
    offsets = zero_points(zeros, bits, rows)
    shifts = offsets * steps if isinstance(offsets, Tensor) else None
    out = x.new_empty((many, rows), dtype=torch.float32)
    height = max(1, min(rows, BLOCK // columns))
    index = torch.empty((height, lookups, periods), dtype=torch.int32)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        picked = _lookup_index(packed[start:stop], bits, codes, index[: stop - start])
        block = table.index_select(0, picked.view(-1)).view(torch.float32)
        grouped = block.view(-1, lookups, groups, group_size // lookups).mul_(steps[start:stop, None, :, None])
        if shifts is not None and narrow != torch.float32:
            # Only centred weights may be rounded to fewer bits; in float32 the sums of x below are cheaper.
            grouped.sub_(shifts[start:stop, None, :, None])
        out[:, start:stop] = ordered @ block.view(-1, columns).to(narrow).T
    if shifts is not None and narrow == torch.float32:
        out -= x.to(torch.float32).reshape(many, groups, group_size).sum(-1) @ shifts.T
    if bias is not None:
        out += bias
    return out.to(x.dtype)


def _lookup_index(packed: Tensor, bits: int, codes: int, index: Tensor) -> Tensor:
    """Write the bits of each lookup, (rows, lookup, period), into `index`."""
    words = packed.view(packed.shape[0], -1, bits).unbind(-1)
    width = bits * codes
    for lookup in range(32 // codes):
        word, shift = divmod(lookup * width, 32)
        if shift + width <= 32:
            torch.bitwise_and(words[word] >> shift, 2**width - 1, out=index[:, lookup])
        else:
            low = (words[word] >> shift) & (2 ** (32 - shift) - 1)
            high = (words[word + 1] & (2 ** (shift + width - 32) - 1)) << (32 - shift)
            torch.bitwise_or(low, high, out=index[:, lookup])
    return index


@cache
def _table(bits: int, codes: int, symmetric: bool) -> Tensor:
    """The values of `codes` neighbouring codes for every pattern of their bits, each row as one element."""
    patterns = torch.arange(2 ** (bits * codes))[:, None] >> (bits * torch.arange(codes))
    values = (patterns & (2**bits - 1)).to(torch.float32) - (2 ** (bits - 1) if symmetric else 0)
    return values.view(ELEMENT[codes]).view(-1)
