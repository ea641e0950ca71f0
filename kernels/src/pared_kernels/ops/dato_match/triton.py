"""Best match as one fused kernel: a query tile against key tile after key tile, the running maximum in registers."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch


@triton.jit
def inverse_norm_kernel(
    metric_ptr,
    inverse_ptr,
    tokens,
    stride_batch,
    stride_token,
    stride_channel,
    CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rows = metric_ptr + batch * stride_batch + token[:, None] * stride_token
    square = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for start in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = (token[:, None] < tokens) & (channel[None, :] < CHANNELS)
        x = tl.load(rows + channel[None, :] * stride_channel, mask=mask, other=0.0).to(tl.float32)
        square += tl.sum(x * x, axis=1)
    inverse = tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
    tl.store(inverse_ptr + batch * tokens + token, inverse, mask=token < tokens)


@triton.jit
def best_match_kernel(
    metric_ptr,
    inverse_ptr,
    query_ptr,
    key_ptr,
    similarity_ptr,
    position_ptr,
    tokens,
    queries,
    keys,
    stride_batch,
    stride_token,
    stride_channel,
    stride_query_batch,
    stride_query,
    stride_key_batch,
    stride_key,
    CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    metric_ptr += batch * stride_batch
    inverse_ptr += batch * tokens
    query = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    is_query = query < queries
    query_token = tl.load(query_ptr + batch * stride_query_batch + query.to(tl.int64) * stride_query, is_query, other=0)
    query_rows = metric_ptr + query_token[:, None] * stride_token
    best = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK_QUERIES,), tl.int32)
    for key_start in range(0, keys, BLOCK_KEYS):
        key = key_start + tl.arange(0, BLOCK_KEYS)
        is_key = key < keys
        key_token = tl.load(key_ptr + batch * stride_key_batch + key.to(tl.int64) * stride_key, is_key, other=0)
        key_rows = metric_ptr + key_token[None, :] * stride_token
        product = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
        for start in range(0, CHANNELS, BLOCK_CHANNELS):
            channel = start + tl.arange(0, BLOCK_CHANNELS)
            is_channel = channel < CHANNELS
            q = tl.load(query_rows + channel[None, :] * stride_channel, is_channel[None, :], other=0.0)
            k = tl.load(key_rows + channel[:, None] * stride_channel, is_channel[:, None], other=0.0)
            if WIDEN:
                q = q.to(tl.float32)
                k = k.to(tl.float32)
            product = tl.dot(q, k, product, input_precision=PRECISION)
        # The order of the scores of one query does not depend on that query's own norm.
        inverse = tl.load(inverse_ptr + key_token)
        score = tl.where(inverse[None, :] > 0, product * inverse[None, :], 0.0)
        score = tl.where(is_key[None, :], score, float("-inf"))
        tile_best, tile_where = tl.max(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        # Strictly greater: an equal score in a later tile has a higher position.
        better = tile_best > best
        best = tl.where(better, tile_best, best)
        where = tl.where(better, key_start + tile_where, where)
    inverse = tl.load(inverse_ptr + query_token)
    out = batch * queries + query
    tl.store(similarity_ptr + out, tl.where(inverse > 0, best * inverse, 0.0), is_query)
    tl.store(position_ptr + out, tl.where(inverse > 0, where, 0).to(tl.int64), is_query)


def inverse_norm_constants(channels: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the constants and launch options of `inverse_norm_kernel` for this many channels."""
    block = min(512, max(16, triton.next_power_of_2(channels)))
    constants = {"CHANNELS": channels, "BLOCK_TOKENS": max(1, 4096 // block), "BLOCK_CHANNELS": block}
    return constants, {"num_warps": 4, "enable_fp_fusion": True}


def best_match_constants(channels: int, dtype: torch.dtype, *, hip: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the constants and launch options of `best_match_kernel` for this many channels of `dtype`."""
    full = dtype == torch.float32
    constants = {
        "CHANNELS": channels,
        "BLOCK_QUERIES": 64,
        "BLOCK_KEYS": 64 if full else 128,
        "BLOCK_CHANNELS": min(32 if full else 64, max(16, triton.next_power_of_2(channels))),
        # TF32 products would change which key wins.
        "PRECISION": "ieee",
        # Triton's interpreter multiplies the bit patterns of bfloat16.
        "WIDEN": dtype == torch.bfloat16 and dispatch.interprets(),
    }
    # Four warps spill the tile of products in float32, and on gfx1100 in every dtype.
    return constants, {"num_warps": 8 if full or hip else 4, "num_stages": 3, "enable_fp_fusion": True}


def unsupported(metric: Tensor, query_idx: Tensor, key_idx: Tensor) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    return "float64 products are left to the reference" if metric.dtype == torch.float64 else None


def best_match(metric: Tensor, query_idx: Tensor, key_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return similarity and position as `pared_kernels.best_match` does."""
    batch, tokens, channels = metric.shape
    queries, keys = query_idx.shape[1], key_idx.shape[1]
    similarity = metric.new_empty((batch, queries), dtype=torch.float32)
    position = query_idx.new_empty((batch, queries))
    if similarity.numel() == 0:
        return similarity, position
    inverse = metric.new_empty((batch, tokens), dtype=torch.float32)
    constants, options = inverse_norm_constants(channels)
    inverse_norm_kernel[(triton.cdiv(tokens, constants["BLOCK_TOKENS"]), batch)](
        metric, inverse, tokens, *metric.stride(), **constants, **options
    )
    constants, options = best_match_constants(channels, metric.dtype, hip=torch.version.hip is not None)
    best_match_kernel[(triton.cdiv(queries, constants["BLOCK_QUERIES"]), batch)](
        metric,
        inverse,
        query_idx,
        key_idx,
        similarity,
        position,
        tokens,
        queries,
        keys,
        *metric.stride(),
        *query_idx.stride(),
        *key_idx.stride(),
        **constants,
        **options,
    )
    return similarity, position
