"""Sum the members of each segment, divide by their weight, put the means where they belong."""

from __future__ import annotations

import torch
from torch import Tensor


def framefusion_segment_mean_compact(
    hidden: Tensor, order: Tensor, seg_start: Tensor, out_index: Tensor, weight: Tensor | None
) -> Tensor:
    """Return what `pared_kernels.framefusion_segment_mean_compact` does."""
    batch, tokens, channels = hidden.shape
    segments = out_index.shape[1]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    place = torch.arange(tokens, device=hidden.device).expand(batch, -1).contiguous()
    # Segment of each place in the order: how many segments start at or before it; members of none go to a spare row.
    segment = torch.searchsorted(seg_start[:, :-1].contiguous(), place, right=True) - 1
    segment = torch.where((segment >= 0) & (place < seg_start[:, -1:]), segment, segments)
    rows = hidden.gather(1, order[..., None].expand_as(hidden)).to(wide)
    weights = rows.new_ones((batch, tokens)) if weight is None else weight.gather(1, order).to(wide)
    sums = rows.new_zeros((batch, segments + 1, channels))
    sums = sums.scatter_add(1, segment[..., None].expand_as(rows), rows * weights[..., None])
    totals = weights.new_zeros((batch, segments + 1)).scatter_add(1, segment, weights)
    means = torch.where(totals[..., None] > 0, sums / totals[..., None], 0.0)[:, :-1]
    out = torch.empty_like(means).scatter(1, out_index[..., None].expand_as(means), means)
    return out.to(hidden.dtype)
