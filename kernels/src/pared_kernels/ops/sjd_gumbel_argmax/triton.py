"""One program a position: four tokens of noise from each Philox counter, the best of them kept by lane."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...philox import KEY_STEPS, MULTIPLIERS, ROUNDS

PHILOX_ROUNDS = tl.constexpr(ROUNDS)
MULTIPLIER_0 = tl.constexpr(MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(MULTIPLIERS[1])
KEY_STEP_0 = tl.constexpr(KEY_STEPS[0])
KEY_STEP_1 = tl.constexpr(KEY_STEPS[1])
NOWHERE = tl.constexpr(2**30)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    m0 = tl.zeros_like(c0) + MULTIPLIER_0
    m1 = tl.zeros_like(c0) + MULTIPLIER_1
    for _ in tl.static_range(PHILOX_ROUNDS):
        low0 = c0 * m0
        low1 = c2 * m1
        high0 = tl.umulhi(c0, m0)
        high1 = tl.umulhi(c2, m1)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + KEY_STEP_0
        k1 = k1 + KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def gumbel(lane):
    """-log(-log r), r = (lane + 1/2) 2^-32, accurate also where r is within a rounding of 1."""
    is_high = lane >= 2147483648
    # Above one half, 1 - r is exact to a rounding, and -log r = -log(1 - t) by the way of Kahan.
    t = ((~lane).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    w = 1.0 - t
    rounded = 1.0 - w
    ratio = tl.where(rounded > 0, t / tl.where(rounded > 0, rounded, 1.0), 1.0)
    high = tl.where(rounded > 0, -tl.log(w) * ratio, t)
    r = (lane.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    low = -tl.log(tl.where(is_high, 0.5, r))
    return -tl.log(tl.where(is_high, high, low))


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream", "first"])
def argmax_kernel(probs_ptr, rows_ptr, positions_ptr, out_ptr, columns, width, seed_low, seed_high, stream, first,
                  stride_batch, stride_position, BLOCK: tl.constexpr):  # fmt: skip
    place = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    probs = probs_ptr + batch * stride_batch + place.to(tl.int64) * stride_position
    index = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.uint32)
    row = zero + tl.load(rows_ptr + batch).to(tl.uint32)
    position = zero + tl.load(positions_ptr + batch * width + place).to(tl.uint32)
    k0 = zero + seed_low.to(tl.uint32)
    k1 = zero + seed_high.to(tl.uint32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), NOWHERE, tl.int32)
    first_counter = first // 4
    for start in range(0, (columns + first % 4 + 3) // 4, BLOCK):
        counter = first_counter + start + index
        c0, c1, c2, c3 = philox(counter.to(tl.uint32), position, row, zero + stream.to(tl.uint32), k0, k1)
        for lane in tl.static_range(4):
            if lane == 0:
                bits = c0
            elif lane == 1:
                bits = c1
            elif lane == 2:
                bits = c2
            else:
                bits = c3
            column = 4 * counter + lane - first
            p = tl.load(probs + column, (column >= 0) & (column < columns), other=0.0).to(tl.float32)
            score = tl.where(p > 0, tl.log(tl.where(p > 0, p, 1.0)) + gumbel(bits), float("-inf"))
            better = score > best
            best = tl.where(better, score, best)
            where = tl.where(better, column, where)
    top = tl.max(best, 0)
    found = tl.min(tl.where(best == top, where, NOWHERE), 0)
    tl.store(out_ptr + batch * width + place, tl.where(found == NOWHERE, 0, found).to(tl.int64))


def constants() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the kernel's constants and launch options."""
    return {"BLOCK": 256}, {"num_warps": 4, "enable_fp_fusion": False}


def unsupported(probs: Tensor, *rest: Any) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    return "float64 is left to the reference" if probs.dtype == torch.float64 else None


def sjd_gumbel_argmax(
    probs: Tensor, rows: Tensor, positions: Tensor, seed_low: int, seed_high: int, stream: int, first: int
) -> Tensor:
    """Return what `pared_kernels.sjd_gumbel_argmax` does."""
    batch, width, columns = probs.shape
    out = torch.empty((batch, width), dtype=torch.int64, device=probs.device)
    if out.numel() == 0:
        return out
    probs = probs if probs.stride(-1) == 1 else probs.contiguous()
    chosen, options = constants()
    argmax_kernel[(width, batch)](
        probs, rows.contiguous(), positions.contiguous(), out, columns, width, _signed(seed_low), _signed(seed_high),
        _signed(stream), first, *probs.stride()[:2], **chosen, **options,
    )  # fmt: skip
    return out


def _signed(word: int) -> int:
    # A 32-bit word as int32, so that its type, and with it the compiled kernel, does not depend on its value.
    return ((word + 2**31) & 0xFFFFFFFF) - 2**31
