"""Weights of 3 or 4 bits in the blocks that torch's product with 4-bit weights reads on a CPU.

In 4 bits a nibble is a code. In 3 bits the first three quarters of a row's groups are *whole*: a nibble holds a code of
theirs in its low bits. The groups that are left are *split*: the highest bits of three nibbles are a code of theirs. So
both take the bytes that the bit stream takes, and masking gives what that product reads: nibbles of 0 to 7, and of 0
or 8 for one bit, whose weight goes to the inputs.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...bitstream import pack_dense
from ..mbq_linear_w16.cpu import signed_codes
from ..mbq_linear_w16.reference import zero_points

#: Numbers of columns that may share a scale in torch's product.
SPANS = (256, 128, 64, 32)
# Rows that are put into blocks at once: their codes are int32 meanwhile.
ROWS = 512


class Shares(NamedTuple):
    """How the groups of a row are stored, and how many columns share a scale in torch's product."""

    whole: int
    split: int
    span: int
    """Divides the size of a group."""

    @property
    def scales(self) -> int:
        """Scales of a row: one for each span of a whole group, three of a split one."""
        return self.whole + 3 * self.split


def shares(bits: int, group_size: int, columns: int) -> Shares:
    """Return how `columns` in groups of `group_size` are stored, counted in spans."""
    span = next(span for span in SPANS if group_size % span == 0)
    count = columns // span
    split = count // 4 if bits == 3 else 0
    return Shares(count - split, split, span)


def why_not(rows: int, bits: int, group_size: int) -> str | None:
    """Return why a weight cannot be put into blocks on this machine, or None."""
    if bits not in (3, 4):
        return f"it holds 3 or 4 bits, not {bits}"
    if rows % 16 or group_size % 32:
        return f"it holds multiples of 16 rows in groups of multiples of 32, not {rows} in groups of {group_size}"
    return None if known() else "torch has no fast product with 4-bit weights on this processor, or not the known one"


def tile(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return (tiles uint8 (N, bytes), steps bfloat16 (scales, N, 2)) for the arguments of `mbq_linear_w16`."""
    rows, columns = len(packed), scales.shape[1] * group_size
    parts = shares(bits, group_size, columns)
    steps = _steps(scales, zero_points(zeros, bits, rows), bits, group_size, parts)
    edge, turned = parts.whole * parts.span, _turned(steps, bits, parts).T
    tiles = []
    for start in range(0, rows, ROWS):
        found = signed_codes(packed[start : start + ROWS], bits).to(torch.int32) + 2 ** (bits - 1)
        nibbles = found[:, :edge] ^ turned[start : start + ROWS].repeat_interleave(parts.span, 1)
        if parts.split:
            bit = torch.cat([(found[:, edge:] >> place) & 1 for place in range(3)], 1)
            nibbles[:, : bit.shape[1]] |= bit << 3
        tiles.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1))
    return torch.cat(tiles), steps


def _steps(scales: Tensor, zeros: Tensor | int, bits: int, group_size: int, parts: Shares) -> Tensor:
    """Scale and offset of every span: torch multiplies by (nibble - 8) scale + offset.

    The offset is a multiple of the scale, which bfloat16 holds exactly if that is a power of two. Where it is none,
    codes may be turned around, 2^bits - 1 - code with the scale's negative, for another multiple.
    """
    repeats = group_size // parts.span
    scale = scales.to(torch.bfloat16).to(torch.float32).repeat_interleave(repeats, 1)
    zero = torch.as_tensor(zeros).to(torch.int32).expand(scales.shape).repeat_interleave(repeats, 1)
    whole, split = slice(parts.whole), slice(parts.whole, None)
    straight, around = 8 - zero[:, whole], zero[:, whole] + 9 - 2**bits
    turn = ~_exact(straight) & _exact(around)
    signed = torch.where(turn, -scale[:, whole], scale[:, whole])
    pairs = [torch.stack([signed, torch.where(turn, around, straight) * signed], -1)]
    for place in range(3 if parts.split else 0):
        # Bits of 0 or 8 less 8, with inputs of an eighth, a quarter and a half: all three make the code less 7, and
        # bits of 7 less the zero point the rest.
        rest = ((7 - zero[:, split]) >> place) & 1
        pairs.append(torch.stack([scale[:, split], 8 * rest * scale[:, split]], -1))
    return torch.cat(pairs, 1).to(torch.bfloat16).transpose(0, 1).contiguous()


def _exact(multiple: Tensor) -> Tensor:
    size = multiple.abs()
    return (size & (size - 1)) == 0


def _turned(steps: Tensor, bits: int, parts: Shares) -> Tensor:
    """What codes of whole groups are combined with to be turned around, int32 (whole, N)."""
    return (steps[: parts.whole, :, 0] < 0).to(torch.int32) * (2**bits - 1)


def untile(tiles: Tensor, steps: Tensor, bits: int, group_size: int, columns: int) -> Tensor:
    """Return the dense bit stream (N, columns * bits / 32) that `tile` was given."""
    parts = shares(bits, group_size, columns)
    found = codes(tiles, bits, group_size, columns)
    turned = _turned(steps, bits, parts).to(torch.uint8)
    found[: parts.whole * parts.span].view(parts.whole, parts.span, -1).bitwise_xor_(turned[:, None])
    return pack_dense(found.T.contiguous(), bits)


def codes(tiles: Tensor, bits: int, group_size: int, columns: int) -> Tensor:
    """Return the codes uint8 (columns, N), a column of the weight in each row; turned around where their scale is."""
    parts = shares(bits, group_size, columns)
    nibbles = _nibbles(tiles)
    if not parts.split:
        return nibbles & (2**bits - 1)
    bit = (nibbles[: 3 * parts.split * parts.span] >> 3).view(3, -1, len(tiles))
    return torch.cat([nibbles & 7, bit[0] | (bit[1] << 1) | (bit[2] << 2)])


def segments(rows: int) -> list[tuple[int, int, int]]:
    """Return (first row, end, rows of a block) of the part in full blocks, and of what is left."""
    full = rows - rows % block()
    return [(a, b, height) for a, b, height in ((0, full, block()), (full, rows, rows - full)) if b > a]


def _nibbles(tiles: Tensor) -> Tensor:
    """The nibbles uint8 (columns, N) of blocks of bytes (columns, rows / 2)."""
    found = []
    for start, stop, height in segments(len(tiles)):
        bytes_ = tiles[start:stop].reshape((stop - start) // height, -1, height // 2)
        both = (bytes_ & 15, bytes_ >> 4)
        rows = torch.cat(both, -1) if _halved(height) else torch.stack(both, -1).flatten(-2)
        found.append(rows.transpose(0, 1).reshape(rows.shape[1], -1))
    return torch.cat(found, 1)


@cache
def block() -> int:
    """Rows of a full block, as torch lays them out on this processor."""
    # The seventeenth byte belongs to the first column of 64 rows, or to the second one of 32.
    probe = torch.arange(64, dtype=torch.int32)[:, None].expand(64, 2) // 16
    return 64 if int(_converted(probe)[16]) & 15 else 32


@cache
def _halved(height: int) -> bool:
    """Whether a byte of a block of `height` rows holds rows half a block apart, not neighbours."""
    probe = torch.arange(height, dtype=torch.int32)[:, None].expand(height, 2) > 1
    return bool(_converted(probe.to(torch.int32))[0] >> 4)


def _converted(nibbles: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.contiguous(), 1).flatten()


@cache
def known() -> bool:
    """Whether torch has its product on this processor, fast, and with blocks as they are read here."""
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    if not all(hasattr(torch.ops.aten, name) for name in names):
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    # A full block, and one that is not, of numbers that differ from their neighbours.
    rows = torch.arange(block() + 16, dtype=torch.int32)
    columns = torch.arange(32, dtype=torch.int32)
    nibbles = (rows[:, None] * 7 + columns * 3 + rows[:, None] // 16) % 16
    tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    if not _nibbles(tiles).T.equal(nibbles.to(torch.uint8)):
        return False
    steps = torch.stack([1 + rows % 2, rows % 3], -1)[None].to(torch.bfloat16)
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 5] = 1
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(x, tiles, 32, steps)
    return product[0].equal(((nibbles[:, 5] - 8) * steps[0, :, 0] + steps[0, :, 1]).to(torch.bfloat16))
