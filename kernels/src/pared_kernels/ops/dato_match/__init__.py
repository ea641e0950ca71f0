"""Closest key token of every query token by cosine, without the query x key matrix.

Serves both matchings of DaTo (arXiv 2501.00375, section 3): candidates to base tokens (`dato_match_max`) and pruned
tokens to kept tokens (`dato_match_kept`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_index, require_tensor
from ...registry import define
from . import reference

__all__ = ["best_match"]


def _fake(metric: Tensor, query_idx: Tensor, key_idx: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if metric.dtype == torch.float64 else torch.float32
    return metric.new_empty(query_idx.shape, dtype=dtype), metric.new_empty(query_idx.shape, dtype=torch.int64)


_operator = define(reference.best_match, _fake)


def best_match(metric: Tensor, query_idx: Tensor, key_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each query token, the largest cosine to a key token and the position of that key in `key_idx`.

    Args:
        metric: (batch, tokens, channels), float16, bfloat16, float32 or float64, any strides.
        query_idx: (batch, queries) int64 token indices, each in [0, tokens).
        key_idx: (batch, keys) int64 token indices, each in [0, tokens), at least one key.

    Returns:
        similarity (batch, queries), float32 (float64 for a float64 metric), and position (batch, queries), int64.
        Products accumulate in the dtype of the similarity; a token of zero (or NaN) norm has similarity 0 to every
        other; equal similarities go to the lower position. Memory beyond the inputs is O(tokens). No gradient flows.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes. Indices are not range-checked on a GPU.
    """
    require_tensor("metric", metric, 3, FLOATS)
    require_index("query_idx", query_idx, metric.shape[0], metric)
    require_index("key_idx", key_idx, metric.shape[0], metric)
    require(key_idx.shape[1] > 0, "number of keys in key_idx", 0, "at least 1")
    return _operator(metric.detach(), query_idx, key_idx)
