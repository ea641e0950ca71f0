"""Importance of tokens as the last queries see them, and the choice of those that stay (section 3.5)."""

from __future__ import annotations

import torch
from pared_kernels import framefusion_last_query_scores
from torch import Tensor

from framefusion.functional.merging import most_similar

UNIMPORTANT = -1.0
"""Importance that stands for NaN, so that such tokens rank last among the candidates."""
NOT_COMPETING = -2.0


def last_query_importance(query: Tensor, key: Tensor, scaling: float, key_valid: Tensor | None = None) -> Tensor:
    """Attention that the last Q queries pay to every key, averaged over heads and queries.

    `query` (batch, heads, Q, head_dim), the last Q of the sequence; `key` (batch, kv_heads, tokens, head_dim) with
    heads a multiple of kv_heads. Query q sees keys up to tokens - Q + q; `key_valid` (batch, tokens) bool hides others,
    such as padding. Returns (batch, tokens) float32, the mean of float32 softmaxes.
    """
    return framefusion_last_query_scores(query, key, scaling, key_valid)


def kept_count(candidates: int, sparsity: float) -> int:
    """round(n (1 - sparsity)), half to even."""
    return round(candidates * (1.0 - sparsity))


def choose_kept(importance: Tensor, candidates: Tensor, sparsity: float) -> Tensor:
    """(tokens,) bool: all that are no candidates, and the round(n (1 - sparsity)) most important candidates.

    `importance` (tokens,) float, NaN ranks last; `candidates` (tokens,) bool. Ties to the lower position.
    """
    count = kept_count(int(candidates.sum()), sparsity)
    scores = importance.nan_to_num(nan=UNIMPORTANT).masked_fill(~candidates, NOT_COMPETING)
    return ~candidates | most_similar(scores, count)


def importance_in_model_dtype(query: Tensor, key: Tensor, scaling: float, key_valid: Tensor | None = None) -> Tensor:
    """`last_query_importance` with inner products in the dtype of `query`, as the published code has them."""
    batch, heads, queries, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, dim)
    logits = (grouped @ key.transpose(-1, -2) * scaling).reshape(batch, heads, queries, -1).float()
    tokens = key.shape[2]
    last = torch.arange(tokens - queries, tokens, device=key.device)
    hidden = torch.arange(tokens, device=key.device) > last[:, None]
    hidden = hidden if key_valid is None else hidden | ~key_valid[:, None, None, :]
    return logits.masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1).mean((1, 2))
