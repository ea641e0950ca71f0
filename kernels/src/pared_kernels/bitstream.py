"""Dense bit streams: integers of 1 to 8 bits side by side in 32-bit words, the layout of packed weights.

Integer i of a row starts at bit `bits * i`, counted from the lowest bit of the first word; it may straddle two words.
Every 32 integers fill exactly `bits` words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import require

PERIOD = 32
"""Integers after which the pattern of shifts repeats."""


def words(size: int, bits: int) -> int:
    """Return how many 32-bit words `size` integers of `bits` bits take."""
    return -(-size * bits // 32)


def pack_dense(codes: Tensor, bits: int, dim: int = 1) -> Tensor:
    """Pack unsigned integers below 2^bits along `dim` into int32 words; the rest of the last word is zero.

    Args:
        codes: integers of any integer dtype, such as uint8 (N, K).
        bits: 1 to 8.
        dim: the dimension whose size K becomes ceil(K * bits / 32).

    Raises:
        ValueError: for bits outside 1 to 8, a floating tensor, or a code that does not fit.
    """
    _require_bits(bits)
    require(not codes.is_floating_point(), "dtype of codes", codes.dtype, "an integer dtype")
    if codes.numel() > 0:
        low, high = int(codes.min()), int(codes.max())
        require(low >= 0 and high < 2**bits, "codes", f"in [{low}, {high}]", f"in [0, {2**bits - 1}] for {bits} bits")
    rows = codes.movedim(dim, -1)
    size = rows.shape[-1]
    rows = torch.nn.functional.pad(rows, (0, -size % PERIOD)).unflatten(-1, (-1, PERIOD))
    # int64, so that a shift past bit 31 shows what belongs to the next word.
    packed = rows.new_zeros((*rows.shape[:-1], bits), dtype=torch.int64)
    for place in range(PERIOD):
        word, shift = divmod(place * bits, 32)
        shifted = rows[..., place].to(torch.int64) << shift
        packed[..., word] |= shifted & 0xFFFFFFFF
        if shift + bits > 32:
            packed[..., word + 1] |= shifted >> 32
    signed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    return signed.flatten(-2)[..., : words(size, bits)].movedim(-1, dim).contiguous()


def unpack_dense(packed: Tensor, bits: int, size: int, dim: int = 1) -> Tensor:
    """Return the `size` integers along `dim` that `pack_dense` packed, as uint8.

    Raises:
        ValueError: for bits outside 1 to 8, another dtype than int32, or another number of words than `size` takes.
    """
    _require_bits(bits)
    require(packed.dtype == torch.int32, "dtype of packed", packed.dtype, "torch.int32")
    count = words(size, bits)
    require(packed.shape[dim] == count, f"words of packed along dim {dim}", packed.shape[dim], f"{count} for {size}")
    rows = packed.movedim(dim, -1)
    rows = torch.nn.functional.pad(rows, (0, -count % bits)).unflatten(-1, (-1, bits))
    codes = rows.new_empty((*rows.shape[:-1], PERIOD), dtype=torch.uint8)
    mask = 2**bits - 1
    for place in range(PERIOD):
        word, shift = divmod(place * bits, 32)
        code = rows[..., word] >> shift
        if shift + bits > 32:
            # The arithmetic shift has filled the upper bits with the sign.
            code = (code & (2 ** (32 - shift) - 1)) | (rows[..., word + 1] << (32 - shift))
        codes[..., place] = code & mask
    return codes.flatten(-2)[..., :size].movedim(-1, dim).contiguous()


def _require_bits(bits: int) -> None:
    require(isinstance(bits, int) and 1 <= bits <= 8, "bits", bits, "1 to 8")
