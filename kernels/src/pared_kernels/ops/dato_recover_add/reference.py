"""Gather, gate, add; rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def dato_recover_add(x: Tensor, y: Tensor, gather_map: Tensor, gate: Tensor | None) -> Tensor:
    """Return what `pared_kernels.dato_recover_add` does; `gate` is (batch, channels) or None."""
    recovered = y[torch.arange(y.shape[0], device=y.device)[:, None], gather_map]
    if gate is None:
        return (x + recovered).contiguous()
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.addcmul(x.to(wide), gate[:, None].to(wide), recovered.to(wide)).to(x.dtype).contiguous()
