"""Appending a token in one launch: some programs multiply rows of A with x, one copies what is kept exactly."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def append_kernel(
    hidden_ptr,
    down_ptr,
    key_ptr,
    value_ptr,
    c_k_ptr,
    c_v_ptr,
    k_row_ptr,
    v_row_ptr,
    cos_ptr,
    sin_ptr,
    cos_row_ptr,
    sin_row_ptr,
    width,
    stride_hidden,
    stride_key_batch,
    stride_key_head,
    stride_value_batch,
    stride_value_head,
    stride_c_k,
    stride_c_v,
    stride_k_batch,
    stride_k_head,
    stride_v_batch,
    stride_v_head,
    stride_cos,
    stride_sin,
    stride_cos_row,
    stride_sin_row,
    RANK_K: tl.constexpr,
    RANK_V: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_EXACT: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) < tl.num_programs(0) - 1:
        rank = tl.program_id(0) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        is_rank = rank < RANK_K + RANK_V
        rows = down_ptr + rank.to(tl.int64)[:, None] * width
        total = tl.zeros((BLOCK_RANK, BLOCK_WIDTH), tl.float32)
        for first in range(0, width, BLOCK_WIDTH):
            channel = first + tl.arange(0, BLOCK_WIDTH)
            is_channel = channel < width
            x = tl.load(hidden_ptr + sample * stride_hidden + channel, is_channel, other=0.0).to(tl.float32)
            a = tl.load(rows + channel[None, :], is_rank[:, None] & is_channel[None, :], other=0.0)
            total += a.to(tl.float32) * x[None, :]
        latent = tl.sum(total, axis=1).to(c_k_ptr.dtype.element_ty)
        tl.store(c_k_ptr + sample * stride_c_k + rank, latent, rank < RANK_K)
        tl.store(c_v_ptr + sample * stride_c_v + (rank - RANK_K), latent, is_rank & (rank >= RANK_K))
    else:
        for first in range(0, HEADS * HEAD_DIM, BLOCK_EXACT):
            place = first + tl.arange(0, BLOCK_EXACT)
            head = place // HEAD_DIM
            dim = place % HEAD_DIM
            mask = place < HEADS * HEAD_DIM
            key = tl.load(key_ptr + sample * stride_key_batch + head * stride_key_head + dim, mask)
            tl.store(k_row_ptr + sample * stride_k_batch + head * stride_k_head + dim, key, mask)
            value = tl.load(value_ptr + sample * stride_value_batch + head * stride_value_head + dim, mask)
            tl.store(v_row_ptr + sample * stride_v_batch + head * stride_v_head + dim, value, mask)
        if ROTARY > 0:
            pair = tl.arange(0, BLOCK_ROTARY)
            mask = pair < ROTARY
            cos = tl.load(cos_ptr + sample * stride_cos + pair, mask)
            tl.store(cos_row_ptr + sample * stride_cos_row + pair, cos, mask)
            sin = tl.load(sin_ptr + sample * stride_sin + pair, mask)
            tl.store(sin_row_ptr + sample * stride_sin_row + pair, sin, mask)


def append_constants(
    *, rank_k: int, rank_v: int, heads: int, head_dim: int, rotary: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the constants of `append_kernel` for these shapes, and its launch options."""
    constants = {
        "RANK_K": rank_k,
        "RANK_V": rank_v,
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "ROTARY": rotary,
        # Few rows for a program: one token's product keeps every processor busy only in small pieces.
        "BLOCK_RANK": 4,
        "BLOCK_WIDTH": 512,
        "BLOCK_EXACT": 1024,
        "BLOCK_ROTARY": max(16, triton.next_power_of_2(rotary)),
    }
    return constants, {"num_warps": 4, "enable_fp_fusion": True}


def unsupported(hidden: Tensor, *rest: Any) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    if hidden.dtype == torch.float64:
        return "float64 is left to the reference"
    written = [one for one in (*rest[3:7], *rest[9:]) if one is not None]
    return "the written rows have gaps between channels" if any(one.stride(-1) != 1 for one in written) else None


def cskv_append(
    hidden: Tensor,
    down: Tensor,
    key: Tensor,
    value: Tensor,
    c_k: Tensor,
    c_v: Tensor,
    k_row: Tensor,
    v_row: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cos_row: Tensor | None,
    sin_row: Tensor | None,
) -> None:
    """Write what `pared_kernels.cskv_append` writes."""
    batch, width = hidden.shape
    heads, head_dim = key.shape[1:]
    hidden, key, value = (one if one.stride(-1) == 1 else one.contiguous() for one in (hidden, key, value))
    cos, sin = (None if one is None else one.contiguous() for one in (cos, sin))
    down = down.contiguous()
    constants, options = append_constants(
        rank_k=c_k.shape[1],
        rank_v=c_v.shape[1],
        heads=heads,
        head_dim=head_dim,
        rotary=0 if cos is None else cos.shape[1],
    )
    blocks = triton.cdiv(down.shape[0], constants["BLOCK_RANK"])
    rotary = [hidden if one is None else one for one in (cos, sin, cos_row, sin_row)]
    append_kernel[(blocks + 1, batch)](
        hidden,
        down,
        key,
        value,
        c_k,
        c_v,
        k_row,
        v_row,
        *rotary,
        width,
        hidden.stride(0),
        *key.stride()[:2],
        *value.stride()[:2],
        c_k.stride(0),
        c_v.stride(0),
        *k_row.stride()[:2],
        *v_row.stride()[:2],
        # One row for all samples is written by each of them, with the same values.
        *(0 if one.shape[0] == 1 else one.stride(0) for one in rotary),
        **constants,
        **options,
    )
