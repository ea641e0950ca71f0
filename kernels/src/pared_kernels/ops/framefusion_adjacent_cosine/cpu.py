"""Cosine of each token and its predecessor: one norm a token, and no copy of all channels at once."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one block of channels: large enough for fast vector code, small enough to stay in the cache.
BLOCK = 1 << 18


def framefusion_adjacent_cosine(hidden: Tensor, prev: Tensor) -> Tensor:
    """Return what `pared_kernels.framefusion_adjacent_cosine` does."""
    batch, tokens, channels = hidden.shape
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    out = hidden.new_empty((batch, tokens), dtype=wide)
    rows = max(1, BLOCK // max(channels, 1))
    for sample in range(batch):
        norms = torch.cat([block.to(wide).norm(dim=-1) for block in hidden[sample].split(rows)]) if tokens else out[0]
        for start in range(0, tokens, rows):
            place = slice(start, start + rows)
            before = prev[sample, place].clamp(min=0)
            dot = (hidden[sample, place].to(wide) * hidden[sample].index_select(0, before).to(wide)).sum(-1)
            norm = norms[place] * norms.index_select(0, before)
            out[sample, place] = torch.where(norm == 0, 0.0, dot / norm)
    return out.masked_fill_(prev < 0, -2.0)
