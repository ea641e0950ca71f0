"""Attention of the last queries to every key, averaged over heads, without repeating key heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...registry import define
from . import reference

__all__ = ["framefusion_last_query_scores"]


def _fake(query: Tensor, key: Tensor, scaling: float, key_valid: Tensor | None) -> Tensor:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((key.shape[0], key.shape[2]), dtype=wide)


_operator = define(reference.framefusion_last_query_scores, _fake)


def framefusion_last_query_scores(
    query: Tensor, key: Tensor, scaling: float, key_valid: Tensor | None = None
) -> Tensor:
    """Return the mean over heads and queries of softmax(scaling q k^T) (FrameFusion, arXiv 2501.01986, section 4.2).

    Args:
        query: (batch, heads, queries, head_dim), the last `queries` of the sequence; float16, bfloat16, float32 or
            float64, any strides.
        key: (batch, kv_heads, tokens, head_dim) in the dtype of `query`; heads is a multiple of kv_heads.
        scaling: factor of the inner products, finite.
        key_valid: (batch, tokens) bool, false for keys that no query sees, or None.

    Returns:
        (batch, tokens) float32 (float64 for float64). Query q sees keys up to tokens - queries + q. Inner products and
        softmax are float32; a query that sees no key counts as zeros. No gradient flows.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes.
    """
    require_tensor("query", query, 4, FLOATS)
    require_tensor("key", key, 4, (query.dtype,))
    batch, heads, queries, dim = query.shape
    require(key.shape[0] == batch, "batch of key", key.shape[0], f"{batch} (batch of query)")
    require(key.shape[3] == dim, "head_dim of key", key.shape[3], f"{dim} (head_dim of query)")
    grouped = key.shape[1] > 0 and heads % key.shape[1] == 0
    require(grouped, "heads of query", heads, f"a multiple of {key.shape[1]} (heads of key)")
    require(1 <= queries <= key.shape[2], "queries", queries, f"1 to {key.shape[2]} (tokens of key)")
    require(abs(scaling) < math.inf, "scaling", scaling, "a finite number")
    if key_valid is not None:
        require_tensor("key_valid", key_valid, 2, (torch.bool,))
        shape = (batch, key.shape[2])
        require(tuple(key_valid.shape) == shape, "shape of key_valid", tuple(key_valid.shape), f"{shape}")
    return _operator(query.detach(), key.detach(), scaling, key_valid)
