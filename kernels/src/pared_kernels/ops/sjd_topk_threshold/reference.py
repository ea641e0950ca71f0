"""The k-th largest number of each row, by sorting."""

from __future__ import annotations

import torch
from torch import Tensor


def sjd_topk_threshold(logits: Tensor, k: int) -> Tensor:
    """Return what `pared_kernels.sjd_topk_threshold` does."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.to(wide).topk(k, dim=-1).values[..., -1].contiguous()
