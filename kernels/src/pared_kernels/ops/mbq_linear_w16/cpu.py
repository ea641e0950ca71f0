"""Packed linear layer on the CPU: four codes at once by table lookup, a cache-sized block of the weight at a time.

Dequantising code by code takes a dozen passes over the weight. Here the bits of four codes select an entry of a table
that holds them as int8. Few rows of x are multiplied in integers: codes are integers anyway, and x is split into two or
three int8 parts of a scale for each group, so that weights never become floating. For many rows the block is
dequantised, and multiplied while it is in the cache.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...bitstream import unpack_dense
from .reference import zero_points

# Weights of one block: in int8 half a megabyte.
BLOCK = 2**19
# From this many rows of x on, dequantising a block costs less than scaling the integer sums of every group.
WIDE = 32
# Parts of an entry of x: 15 bits of the largest entry in its group for 16-bit x, which round more; 23 for float32.
PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
# What one part is to the next: rounding leaves at most half a unit, which becomes at most 127.
FINER = 254


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
    steps = scales.to(torch.float32)
    offsets = zero_points(zeros, bits, packed.shape[0])
    # Codes are centred, so that they fit into int8: what is left of the zero points, times the step.
    shifts = (offsets.to(torch.float32) - 2 ** (bits - 1)) * steps if isinstance(offsets, Tensor) else None
    product = _dequantized if len(x) >= WIDE else _integer
    out = product(x, packed, steps, shifts, bits, group_size)
    if bias is not None:
        out += bias
    return out.to(x.dtype)


def _integer(x: Tensor, packed: Tensor, steps: Tensor, shifts: Tensor | None, bits: int, group_size: int) -> Tensor:
    """The product in float32 (M, N), as integer sums of every group."""
    (many, columns), rows = x.shape, len(packed)
    out = torch.zeros((many, rows), dtype=torch.float32)
    if many == 0:
        return out
    groups, count = columns // group_size, PARTS[x.dtype]
    left = x.to(torch.float32).view(many, groups, group_size)
    unit = left.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    left = left / unit
    parts = torch.empty((groups, count, many, group_size), dtype=torch.int8)
    totals = torch.zeros((many, groups), dtype=torch.float32)
    for part in range(count):
        whole = left.round()
        parts[:, part] = whole.transpose(0, 1)
        totals += whole.sum(-1) / FINER**part
        left = (left - whole) * FINER
    units = unit.squeeze(-1)
    width, height = group_size * bits // 32, max(1, BLOCK // group_size)
    for group in range(groups):
        words = packed[:, group * width : (group + 1) * width]
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            block = signed_codes(words[start:stop], bits)
            sums = torch._int_mm(parts[group].view(-1, group_size), block.T).view(count, many, -1)
            value = sums[-1].to(torch.float32)
            for part in range(count - 2, -1, -1):
                value = value.div_(FINER).add_(sums[part])
            out[:, start:stop] += value.mul_(units[:, group, None]).mul_(steps[start:stop, group])
    return out if shifts is None else out.sub_((totals * units) @ shifts.T)


def _dequantized(x: Tensor, packed: Tensor, steps: Tensor, shifts: Tensor | None, bits: int, group_size: int) -> Tensor:
    """The product in float32 (M, N), block by block of dequantised rows, in bfloat16 if x is."""
    (many, columns), rows = x.shape, len(packed)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    left = x.to(dtype)
    out = torch.empty((many, rows), dtype=torch.float32)
    height = max(1, BLOCK // columns)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        block = signed_codes(packed[start:stop], bits).to(torch.float32).view(stop - start, -1, group_size)
        block *= steps[start:stop, :, None]
        if shifts is not None:
            block -= shifts[start:stop, :, None]
        out[:, start:stop] = left @ block.view(-1, columns).to(dtype).T
    return out


def signed_codes(packed: Tensor, bits: int) -> Tensor:
    """Return the codes of rows (N, words) less 2^(bits - 1), int8 (N, 32 * words / bits)."""
    rows, columns = len(packed), packed.shape[1] * 32 // bits
    packed = packed.contiguous()
    if bits == 3:
        index = _three_bit_index(packed)
    elif bits in (2, 4):
        # Four codes are a byte or two of the stream.
        index = packed.view(torch.uint8 if bits == 2 else torch.uint16).to(torch.int32).view(-1)
    else:
        return (unpack_dense(packed, bits, columns).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    return _table(bits).index_select(0, index).view(torch.int8).view(rows, columns)


def _three_bit_index(packed: Tensor) -> Tensor:
    """Entries of the table for each twelve bits, without shifting any.

    Sixteen codes are six bytes. Their quarters begin in bytes 0, 1, 3 and 4, with the first bit or with the fifth: the
    two bytes from there on are the index, and the table ignores the four bits that are not asked for.
    """
    stream = packed.view(torch.uint8).view(-1)
    later = torch.empty_like(stream)
    later[:-1] = stream[1:]
    even, odd = (half.view(torch.uint16).view(-1, 3) for half in (stream, later))
    index = torch.empty((len(even), 4), dtype=torch.int32)
    index[:, 0] = even[:, 0]
    index[:, 1] = odd[:, 0]
    index[:, 2] = odd[:, 1]
    index[:, 3] = even[:, 2]
    index[:, 1::2] += 2**16
    return index.view(-1)


@cache
def _table(bits: int) -> Tensor:
    """The four centred codes of every pattern of bits, as the bytes of one int32."""
    patterns = torch.arange(2 ** (8 if bits == 2 else 16))[:, None]
    if bits == 3:
        patterns = torch.cat([patterns, patterns >> 4])
    codes = (patterns >> (bits * torch.arange(4))) & (2**bits - 1)
    return (codes - 2 ** (bits - 1)).to(torch.int8).view(torch.int32).view(-1)
