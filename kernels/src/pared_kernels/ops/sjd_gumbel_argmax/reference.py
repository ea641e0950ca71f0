"""argmax(log p + noise), with the noise written out."""

from __future__ import annotations

import torch
from torch import Tensor

from ...philox import gumbel


def sjd_gumbel_argmax(
    probs: Tensor, rows: Tensor, positions: Tensor, seed_low: int, seed_high: int, stream: int, first: int
) -> Tensor:
    """Return what `pared_kernels.sjd_gumbel_argmax` does; the seed comes in words of 32 bits."""
    wide = torch.float64 if probs.dtype == torch.float64 else torch.float32
    noise = gumbel(seed_low | seed_high << 32, rows, positions, probs.shape[2], stream, wide, first)
    return (probs.to(wide).log() + noise).argmax(-1)
