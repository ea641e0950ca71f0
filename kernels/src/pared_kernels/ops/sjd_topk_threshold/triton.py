"""Radix select on bit patterns: one program a row, a histogram of one byte at a time, from the highest byte down."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SIGN = tl.constexpr(-(2**31))


@triton.jit
def threshold_kernel(logits_ptr, out_ptr, columns, k, stride_row, PASSES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * stride_row
    place = tl.arange(0, BLOCK)
    digit = tl.arange(0, 512)
    prefix = tl.full((), 0, tl.int32)
    wanted = k
    for step in tl.static_range(PASSES):
        counts = tl.zeros((512,), tl.int32)
        for start in range(0, columns, BLOCK):
            inside = start + place < columns
            bits = tl.load(logits + start + place, inside, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
            # Ordered like the numbers, as an unsigned integer: negative ones are flipped, others get the sign bit.
            keys = tl.where(bits < 0, ~bits, bits ^ SIGN)
            if step > 0:
                # The bytes above must be those that were chosen; the shifted-in sign is masked away.
                inside = inside & (((keys >> (32 - 8 * step)) & ((1 << (8 * step)) - 1)) == prefix)
            # What does not count goes to the upper half of the histogram.
            counts += tl.histogram(tl.where(inside, (keys >> (24 - 8 * step)) & 255, 256), 512)
        counts = tl.where(digit < 256, counts, 0)
        greater = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        chosen = (greater < wanted) & (wanted <= greater + counts)
        byte = tl.sum(tl.where(chosen, digit, 0), 0)
        wanted = wanted - tl.sum(tl.where(chosen, greater, 0), 0)
        prefix = (prefix << 8) | byte
    key = prefix << (8 * (4 - PASSES))
    bits = tl.where(key < 0, key ^ SIGN, ~key)
    if PASSES < 4:
        # The bytes that were not looked at are zero in the number, and were flipped with it where it is negative.
        low: tl.constexpr = (1 << (8 * (4 - PASSES))) - 1
        bits = bits & ~low
    tl.store(out_ptr + row, bits.to(tl.float32, bitcast=True))


def constants(dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the kernel's constants and launch options; narrow types have their bits in the upper bytes of float32."""
    passes = {torch.bfloat16: 2, torch.float16: 3}.get(dtype, 4)
    return {"PASSES": passes, "BLOCK": 4096}, {"num_warps": 8, "enable_fp_fusion": True}


def unsupported(logits: Tensor, k: int) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    return "float64 is left to the reference" if logits.dtype == torch.float64 else None


def sjd_topk_threshold(logits: Tensor, k: int) -> Tensor:
    """Return what `pared_kernels.sjd_topk_threshold` does."""
    rows, columns = logits.shape
    out = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return out
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    chosen, options = constants(logits.dtype)
    threshold_kernel[(rows,)](logits, out, columns, k, logits.stride(0), **chosen, **options)
    return out
