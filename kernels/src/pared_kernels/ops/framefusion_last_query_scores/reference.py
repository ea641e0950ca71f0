"""Softmax of the last queries over all keys, averaged over heads and queries."""

from __future__ import annotations

import torch
from torch import Tensor


def framefusion_last_query_scores(query: Tensor, key: Tensor, scaling: float, key_valid: Tensor | None) -> Tensor:
    """Return what `pared_kernels.framefusion_last_query_scores` does."""
    batch, heads, queries, dim = query.shape
    kv_heads, tokens = key.shape[1], key.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(wide).reshape(batch, kv_heads, heads // kv_heads * queries, dim)
    logits = (grouped @ key.to(wide).transpose(-1, -2) * scaling).reshape(batch, heads, queries, tokens)
    row = torch.arange(queries, device=key.device)[:, None]
    hidden = torch.arange(tokens, device=key.device) > tokens - queries + row
    hidden = hidden if key_valid is None else hidden | ~key_valid[:, None, None, :]
    # A query that sees nothing pays no attention: exp(-inf - 0) everywhere.
    logits = logits.masked_fill(hidden, -torch.inf)
    shifted = logits - logits.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
    weights = shifted.exp()
    sums = weights.sum(-1, keepdim=True)
    return (weights / torch.where(sums == 0, 1.0, sums)).mean((1, 2))
