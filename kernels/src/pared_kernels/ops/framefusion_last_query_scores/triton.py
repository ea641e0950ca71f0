"""Two passes, both split over the keys: the normaliser of each query's softmax, then the mean over heads and queries.

The first pass reads the keys from memory; for the prompts this is made for they then lie in the cache of the GPU.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_KEYS = 64
MAX_HEAD_DIM = 512


@triton.jit
def _logits(query_ptr, key_ptr, valid_ptr, batch, head, row, place, GROUP: tl.constexpr, QUERIES: tl.constexpr,
            DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, HAS_VALID: tl.constexpr,
            tokens, scaling, stride_query_batch, stride_query_head, stride_query, stride_key_batch, stride_key_head,
            stride_key, stride_valid_batch):  # fmt: skip
    channel = tl.arange(0, BLOCK_DIM)
    inside = channel < DIM
    x = tl.load(
        query_ptr
        + batch * stride_query_batch
        + (head * GROUP + row // QUERIES) * stride_query_head
        + (row % QUERIES) * stride_query
        + channel,
        inside,
        other=0.0,
    ).to(tl.float32)
    is_key = place < tokens
    keys = tl.load(
        key_ptr
        + batch * stride_key_batch
        + head * stride_key_head
        + place[:, None].to(tl.int64) * stride_key
        + channel[None, :],
        is_key[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    logits = tl.sum(keys * x[None, :], axis=1) * scaling
    seen = is_key & (place <= tokens - QUERIES + row % QUERIES)
    if HAS_VALID:
        seen = seen & (tl.load(valid_ptr + batch * stride_valid_batch + place, is_key, other=0) != 0)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def partial_softmax_kernel(query_ptr, key_ptr, valid_ptr, max_ptr, sum_ptr, tokens, splits, scaling,
                           stride_query_batch, stride_query_head, stride_query, stride_key_batch, stride_key_head,
                           stride_key, stride_valid_batch, HEADS: tl.constexpr, GROUP: tl.constexpr,
                           QUERIES: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
                           HAS_VALID: tl.constexpr):  # fmt: skip
    split = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    place = split * BLOCK + tl.arange(0, BLOCK)
    for row in range(GROUP * QUERIES):
        logits = _logits(query_ptr, key_ptr, valid_ptr, batch, head, row, place, GROUP, QUERIES, DIM, BLOCK_DIM,
                         HAS_VALID, tokens, scaling, stride_query_batch, stride_query_head, stride_query,
                         stride_key_batch, stride_key_head, stride_key, stride_valid_batch)  # fmt: skip
        largest = tl.max(logits, axis=0)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        out = ((batch * HEADS + head) * GROUP * QUERIES + row) * splits + split
        tl.store(max_ptr + out, largest)
        tl.store(sum_ptr + out, tl.sum(tl.exp(logits - shift), axis=0))


@triton.jit
def mean_weights_kernel(query_ptr, key_ptr, valid_ptr, max_ptr, sum_ptr, out_ptr, tokens, scaling,
                        stride_query_batch, stride_query_head, stride_query, stride_key_batch, stride_key_head,
                        stride_key, stride_valid_batch, HEADS: tl.constexpr, GROUP: tl.constexpr,
                        QUERIES: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
                        HAS_VALID: tl.constexpr):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    mean = tl.zeros([BLOCK], tl.float32)
    for head in range(HEADS):
        for row in range(GROUP * QUERIES):
            logits = _logits(query_ptr, key_ptr, valid_ptr, batch, head, row, place, GROUP, QUERIES, DIM, BLOCK_DIM,
                             HAS_VALID, tokens, scaling, stride_query_batch, stride_query_head, stride_query,
                             stride_key_batch, stride_key_head, stride_key, stride_valid_batch)  # fmt: skip
            where = (batch * HEADS + head) * GROUP * QUERIES + row
            total = tl.load(sum_ptr + where)
            largest = tl.load(max_ptr + where)
            weights = tl.exp(logits - tl.where(largest == float("-inf"), 0.0, largest))
            mean += weights / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + batch * tokens + place, mean / (HEADS * GROUP * QUERIES), place < tokens)


def constants(heads: int, kv_heads: int, queries: int, dim: int, valid: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constants of both kernels and their launch options."""
    chosen = {
        "HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "QUERIES": queries,
        "DIM": dim,
        "BLOCK_DIM": triton.next_power_of_2(dim),
        "BLOCK": BLOCK_KEYS,
        "HAS_VALID": valid,
    }
    return chosen, {"num_warps": 4, "enable_fp_fusion": True}


def unsupported(query: Tensor, key: Tensor, scaling: float, key_valid: Tensor | None) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    if query.dtype == torch.float64:
        return "float64 is left to the reference"
    return f"heads of more than {MAX_HEAD_DIM} channels" if query.shape[3] > MAX_HEAD_DIM else None


def framefusion_last_query_scores(query: Tensor, key: Tensor, scaling: float, key_valid: Tensor | None) -> Tensor:
    """Return what `pared_kernels.framefusion_last_query_scores` does."""
    batch, heads, queries, dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    out = query.new_empty((batch, tokens), dtype=torch.float32)
    if out.numel() == 0:
        return out
    chosen, options = constants(heads, kv_heads, queries, dim, key_valid is not None)
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    splits = triton.cdiv(tokens, BLOCK_KEYS)
    partial = (batch, heads * queries, splits)
    maxima, sums = (query.new_empty(partial, dtype=torch.float32) for _ in range(2))
    valid = key if key_valid is None else key_valid.contiguous().view(torch.uint8)
    strides = (*query.stride()[:3], *key.stride()[:3], 0 if key_valid is None else tokens)
    partial_softmax_kernel[(splits, kv_heads, batch)](
        query, key, valid, maxima, sums, tokens, splits, scaling, *strides, **chosen, **options
    )
    largest = maxima.amax(-1)
    # Blocks in which nothing is seen carry the sum 0 and the maximum -inf.
    scale = (maxima - largest.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp()
    total = (sums * scale).sum(-1)
    mean_weights_kernel[(splits, batch)](
        query, key, valid, largest, total, out, tokens, scaling, *strides, **chosen, **options
    )
    return out
