"""Best match by the full cosine matrix: obviously right, O(queries x keys) memory."""

from __future__ import annotations

import torch
from torch import Tensor


def best_match(metric: Tensor, query_idx: Tensor, key_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return similarity and position as `pared_kernels.best_match` does."""
    metric = metric if metric.dtype == torch.float64 else metric.float()
    norm = metric.norm(dim=-1, keepdim=True)
    direction = torch.where(norm > 0, metric / norm, 0.0)
    samples = torch.arange(metric.shape[0], device=metric.device)[:, None]
    cosine = direction[samples, query_idx] @ direction[samples, key_idx].transpose(1, 2)
    similarity, position = cosine.max(dim=-1)
    return similarity, position
