"""Layer norm of gathered rows: each program normalises a few rows, held in registers."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# A row lives in the registers of one program.
MAX_CHANNELS = 16384


@triton.jit
def norm_gather_kernel(
    x_ptr,
    index_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    kept,
    eps,
    stride_batch,
    stride_token,
    stride_channel,
    stride_index_batch,
    stride_index,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < kept
    channel = tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < CHANNELS
    mask = is_row[:, None] & is_channel[None, :]
    token = tl.load(index_ptr + batch * stride_index_batch + row * stride_index, is_row, other=0)
    rows = x_ptr + batch * stride_batch + token[:, None] * stride_token
    x = tl.load(rows + channel[None, :] * stride_channel, mask, other=0.0).to(tl.float32)
    centred = tl.where(is_channel[None, :], x - (tl.sum(x, axis=1) / CHANNELS)[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / CHANNELS
    y = centred * (1.0 / tl.sqrt(variance + eps))[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + channel, is_channel, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, is_channel, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (batch * kept + row[:, None]) * CHANNELS + channel[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask)


def constants(channels: int, has_weight: bool, has_bias: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the kernel's constants and launch options for this many channels."""
    block = triton.next_power_of_2(channels)
    chosen = {
        "CHANNELS": channels,
        # 2048 elements a program: 16 of them in each of 128 threads.
        "BLOCK_ROWS": max(1, 2048 // block),
        "BLOCK_CHANNELS": block,
        "HAS_WEIGHT": has_weight,
        "HAS_BIAS": has_bias,
    }
    return chosen, {"num_warps": 4 if block <= 4096 else 16, "enable_fp_fusion": True}


def unsupported(x: Tensor, index: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    if x.element_size() == 8:
        return "float64 is left to the reference"
    return f"more than {MAX_CHANNELS} channels" if x.shape[2] > MAX_CHANNELS else None


def dato_norm_gather(x: Tensor, index: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return what `pared_kernels.dato_norm_gather` does."""
    batch, kept, channels = x.shape[0], index.shape[1], x.shape[2]
    out = x.new_empty((batch, kept, channels))
    if out.numel() == 0:
        return out
    chosen, options = constants(channels, weight is not None, bias is not None)
    norm_gather_kernel[(triton.cdiv(kept, chosen["BLOCK_ROWS"]), batch)](
        x,
        index,
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        out,
        kept,
        eps,
        *x.stride(),
        *index.stride(),
        **chosen,
        **options,
    )
    return out
