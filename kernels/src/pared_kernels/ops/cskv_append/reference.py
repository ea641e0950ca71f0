"""Appending one token with plain torch: a product and copies."""

from __future__ import annotations

import torch
from torch import Tensor


def cskv_append(
    hidden: Tensor,
    down: Tensor,
    key: Tensor,
    value: Tensor,
    c_k: Tensor,
    c_v: Tensor,
    k_row: Tensor,
    v_row: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cos_row: Tensor | None,
    sin_row: Tensor | None,
) -> None:
    """Write what `pared_kernels.cskv_append` writes."""
    latent = torch.nn.functional.linear(hidden, down)
    c_k.copy_(latent[:, : c_k.shape[1]])
    c_v.copy_(latent[:, c_k.shape[1] :])
    k_row.copy_(key)
    v_row.copy_(value)
    if cos is not None and sin is not None and cos_row is not None and sin_row is not None:
        cos_row.copy_(cos)
        sin_row.copy_(sin)
