"""One program per token: both rows stream through registers once, three sums at a time."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096


@triton.jit
def adjacent_cosine_kernel(
    hidden_ptr,
    prev_ptr,
    out_ptr,
    tokens,
    stride_batch,
    stride_token,
    stride_channel,
    stride_prev_batch,
    stride_prev,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    before = tl.load(prev_ptr + batch * stride_prev_batch + token * stride_prev)
    place = out_ptr + batch * tokens + token
    if before < 0:
        tl.store(place, -2.0)
    else:
        row = hidden_ptr + batch * stride_batch + token * stride_token
        partner = hidden_ptr + batch * stride_batch + before * stride_token
        dot = tl.zeros([BLOCK], tl.float32)
        ours = tl.zeros([BLOCK], tl.float32)
        theirs = tl.zeros([BLOCK], tl.float32)
        for start in range(0, CHANNELS, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            inside = channel < CHANNELS
            x = tl.load(row + channel * stride_channel, inside, other=0.0).to(tl.float32)
            y = tl.load(partner + channel * stride_channel, inside, other=0.0).to(tl.float32)
            dot += x * y
            ours += x * x
            theirs += y * y
        norm = tl.sqrt(tl.sum(ours, axis=0)) * tl.sqrt(tl.sum(theirs, axis=0))
        cosine = tl.sum(dot, axis=0) / tl.where(norm == 0.0, 1.0, norm)
        tl.store(place, tl.where(norm == 0.0, 0.0, cosine))


def constants(channels: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the kernel's constants and launch options for this many channels."""
    block = min(MAX_BLOCK, triton.next_power_of_2(channels))
    return {"CHANNELS": channels, "BLOCK": block}, {"num_warps": 4 if block >= 1024 else 1, "enable_fp_fusion": True}


def unsupported(hidden: Tensor, prev: Tensor) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    return "float64 is left to the reference" if hidden.dtype == torch.float64 else None


def framefusion_adjacent_cosine(hidden: Tensor, prev: Tensor) -> Tensor:
    """Return what `pared_kernels.framefusion_adjacent_cosine` does."""
    batch, tokens, channels = hidden.shape
    out = hidden.new_empty((batch, tokens), dtype=torch.float32)
    if out.numel() == 0:
        return out
    if channels == 0:
        return torch.where(prev < 0, -2.0, 0.0)
    chosen, options = constants(channels)
    adjacent_cosine_kernel[(tokens, batch)](
        hidden, prev, out, tokens, *hidden.stride(), *prev.stride(), **chosen, **options
    )
    return out
