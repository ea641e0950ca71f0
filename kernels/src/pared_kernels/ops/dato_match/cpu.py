"""Best match by blocked matrix products: a block of scores at a time, never queries x keys."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of one product, and scores in one block (4 MB in float32): large enough for a fast product, small against inputs.
QUERY_BLOCK = 1024
KEY_BLOCK = 1024


def best_match(metric: Tensor, query_idx: Tensor, key_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return similarity and position as `pared_kernels.best_match` does."""
    dtype = torch.float64 if metric.dtype == torch.float64 else torch.float32
    similarity = metric.new_full(query_idx.shape, -torch.inf, dtype=dtype)
    position = query_idx.new_zeros(query_idx.shape)
    for sample, tokens in enumerate(metric):
        for key_start in range(0, key_idx.shape[1], KEY_BLOCK):
            keys = _directions(tokens, key_idx[sample, key_start : key_start + KEY_BLOCK], dtype)
            for query_start in range(0, query_idx.shape[1], QUERY_BLOCK):
                rows = slice(query_start, query_start + QUERY_BLOCK)
                queries = _directions(tokens, query_idx[sample, rows], dtype)
                block_max, block_arg = (queries @ keys.T).max(dim=-1)
                best, where = similarity[sample, rows], position[sample, rows]
                # Strictly greater: an equal score in a later block has a higher position.
                better = block_max > best
                best.copy_(torch.where(better, block_max, best))
                where.copy_(torch.where(better, block_arg + key_start, where))
    return similarity, position


def _directions(tokens: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    rows = tokens.index_select(0, index).to(dtype)
    norm = rows.norm(dim=-1, keepdim=True)
    return rows.div(norm).masked_fill_(~(norm > 0), 0.0)
