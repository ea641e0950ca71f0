"""Gather the predecessors, then the cosine of each pair."""

from __future__ import annotations

import torch
from torch import Tensor


def framefusion_adjacent_cosine(hidden: Tensor, prev: Tensor) -> Tensor:
    """Return what `pared_kernels.framefusion_adjacent_cosine` does."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    partner = wide.gather(1, prev.clamp(min=0)[..., None].expand_as(wide))
    dot = (wide * partner).sum(-1)
    # The norms separately: their product underflows later than the product of the squares.
    norm = wide.norm(dim=-1) * partner.norm(dim=-1)
    cosine = torch.where(norm == 0, 0.0, dot / norm)
    return torch.where(prev < 0, -2.0, cosine)
