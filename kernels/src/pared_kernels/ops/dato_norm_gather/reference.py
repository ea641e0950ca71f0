"""Gather, then torch's layer norm."""

from __future__ import annotations

import torch
from torch import Tensor


def dato_norm_gather(x: Tensor, index: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return what `pared_kernels.dato_norm_gather` does."""
    rows = x[torch.arange(x.shape[0], device=x.device)[:, None], index]
    return torch.nn.functional.layer_norm(rows, rows.shape[-1:], weight, bias, eps)
