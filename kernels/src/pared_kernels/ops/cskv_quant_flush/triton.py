"""Quantising finished groups: a program for some bytes of a group of tokens, or for all channels of one token."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import SMALLEST_RANGE

LARGEST_ROW = 4096
"""Channels of one token that a program holds in registers."""

SMALLEST = tl.constexpr(SMALLEST_RANGE)
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def rounded(x):
    """Round to the nearest integer, ties to even; 1.5 * 2^23 leaves float32 no bits behind the point."""
    return (x + ROUNDING) - ROUNDING


@triton.jit
def group_parameters(low, high, LEVELS: tl.constexpr, CLAMPED: tl.constexpr):
    """Scale and offset of groups with these extremes; divisions round as IEEE says, as those of torch do."""
    scale = tl.div_rn(tl.maximum(high - low, SMALLEST), tl.zeros_like(low) + LEVELS)
    if CLAMPED:
        zero = -rounded(tl.div_rn(low, scale))
        return scale, tl.minimum(tl.maximum(zero, 0.0), LEVELS)
    return scale, low


@triton.jit
def codes_of(x, scale, offset, LEVELS: tl.constexpr, CLAMPED: tl.constexpr):
    if CLAMPED:
        code = rounded(tl.div_rn(x, scale)) + offset
    else:
        code = rounded(tl.div_rn(x - offset, scale))
    return tl.minimum(tl.maximum(code, 0.0), LEVELS).to(tl.int32)


@triton.jit
def over_tokens_kernel(
    latents_ptr,
    codes_ptr,
    scale_ptr,
    offset_ptr,
    stride_batch,
    stride_token,
    stride_channel,
    stride_codes_batch,
    stride_codes_token,
    stride_scale_batch,
    stride_scale_group,
    stride_offset_batch,
    stride_offset_group,
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = 2**BITS - 1
    group = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    place = tl.arange(0, BLOCK_TOKENS)
    token = group * GROUP + place
    byte = tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    part = tl.arange(0, PER_BYTE)
    channel = byte[:, None] * PER_BYTE + part[None, :]
    is_channel = channel < CHANNELS
    is_token = place < GROUP
    rows = latents_ptr + sample * stride_batch + token[:, None, None] * stride_token
    mask = is_token[:, None, None] & is_channel[None, :, :]
    x = tl.load(rows + channel[None, :, :] * stride_channel, mask, other=0.0).to(tl.float32)
    low = tl.min(tl.where(mask, x, float("inf")), axis=0)
    high = tl.max(tl.where(mask, x, float("-inf")), axis=0)
    # Channels that do not exist have no extremes; as groups of zeros their codes are 0.
    low = tl.where(is_channel, low, 0.0)
    high = tl.where(is_channel, high, 0.0)
    scale, offset = group_parameters(low, high, LEVELS, CLAMPED)
    code = codes_of(x, scale[None, :, :], offset[None, :, :], LEVELS, CLAMPED)
    packed = tl.sum(code << (part * BITS)[None, None, :], axis=2).to(tl.uint8)
    at = sample * stride_codes_batch + token[:, None] * stride_codes_token + byte[None, :]
    tl.store(codes_ptr + at, packed, is_token[:, None] & (byte * PER_BYTE < CHANNELS)[None, :])
    at = sample * stride_scale_batch + group * stride_scale_group + channel
    tl.store(scale_ptr + at, scale.to(tl.float16), is_channel)
    at = sample * stride_offset_batch + group * stride_offset_group + channel
    tl.store(offset_ptr + at, offset.to(tl.float16), is_channel)


@triton.jit
def over_channels_kernel(
    latents_ptr,
    codes_ptr,
    scale_ptr,
    offset_ptr,
    stride_batch,
    stride_token,
    stride_channel,
    stride_codes_batch,
    stride_codes_token,
    stride_scale_batch,
    stride_scale_group,
    stride_offset_batch,
    stride_offset_group,
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CLAMPED: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = 2**BITS - 1
    token = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    byte = tl.arange(0, BLOCK_BYTES)
    part = tl.arange(0, PER_BYTE)
    channel = byte[:, None] * PER_BYTE + part[None, :]
    is_channel = channel < CHANNELS
    row = latents_ptr + sample * stride_batch + token * stride_token
    x = tl.load(row + channel * stride_channel, is_channel, other=0.0).to(tl.float32)
    # Channels that do not exist keep these, and the code 0.
    scale = tl.zeros_like(x) + 1.0
    offset = tl.zeros_like(x)
    # A byte may hold channels of two groups: every group is reduced over the whole row.
    for group in range(CHANNELS // GROUP):
        own = is_channel & (channel // GROUP == group)
        low = tl.min(tl.min(tl.where(own, x, float("inf")), axis=1), axis=0)
        high = tl.max(tl.max(tl.where(own, x, float("-inf")), axis=1), axis=0)
        own_scale, own_offset = group_parameters(low, high, LEVELS, CLAMPED)
        scale = tl.where(own, own_scale, scale)
        offset = tl.where(own, own_offset, offset)
        at = sample * stride_scale_batch + token * stride_scale_group + group
        tl.store(scale_ptr + at, own_scale.to(tl.float16))
        at = sample * stride_offset_batch + token * stride_offset_group + group
        tl.store(offset_ptr + at, own_offset.to(tl.float16))
    code = codes_of(x, scale, offset, LEVELS, CLAMPED)
    packed = tl.sum(code << (part * BITS)[None, :], axis=1).to(tl.uint8)
    at = sample * stride_codes_batch + token * stride_codes_token + byte
    tl.store(codes_ptr + at, packed, byte * PER_BYTE < CHANNELS)


def flush_constants(
    *, channels: int, bits: int, group: int, per_token: bool, clamped: bool
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the constants of the kernel for this grouping, and its launch options."""
    size = -(-channels * bits // 8)
    constants = {"CHANNELS": channels, "BITS": bits, "GROUP": group, "CLAMPED": clamped}
    if per_token:
        constants |= {"BLOCK_BYTES": triton.next_power_of_2(size)}
    else:
        constants |= {"BLOCK_TOKENS": triton.next_power_of_2(group), "BLOCK_BYTES": 32}
    # Contracted products would round differently from torch.
    return constants, {"num_warps": 4, "enable_fp_fusion": False}


def unsupported(
    latents: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group: int, per_token: bool, *rest: Any
) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    if latents.dtype == torch.float64:
        return "float64 is left to the reference"
    if not per_token and group > 128:
        return f"groups of {group} tokens do not fit a program; up to 128 do"
    if per_token and latents.shape[2] > LARGEST_ROW:
        return f"rows of {latents.shape[2]} channels do not fit a program; up to {LARGEST_ROW} do"
    gaps = any(one.stride(2) != 1 for one in (codes, scale, offset))
    return "the written rows have gaps between channels" if gaps else None


def cskv_quant_flush(
    latents: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group: int, per_token: bool, clamped: bool
) -> None:
    """Write what `pared_kernels.cskv_quant_flush` writes."""
    batch, tokens, channels = latents.shape
    if latents.numel() == 0:
        return
    constants, options = flush_constants(
        channels=channels, bits=bits, group=group, per_token=per_token, clamped=clamped
    )
    strides = (*latents.stride(), *codes.stride()[:2], *scale.stride()[:2], *offset.stride()[:2])
    if per_token:
        over_channels_kernel[(tokens, batch)](latents, codes, scale, offset, *strides, **constants, **options)
        return
    blocks = triton.cdiv(codes.shape[2], constants["BLOCK_BYTES"])
    over_tokens_kernel[(tokens // group, blocks, batch)](
        latents, codes, scale, offset, *strides, **constants, **options
    )
