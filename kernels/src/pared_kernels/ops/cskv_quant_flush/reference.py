"""Quantising finished groups of latents with plain torch: minimum and maximum, codes, bytes."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_RANGE = 1e-5
"""A group whose values span less is quantised as if it spanned this much."""


def cskv_quant_flush(
    latents: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int, group: int, per_token: bool, clamped: bool
) -> None:
    """Write what `pared_kernels.cskv_quant_flush` writes."""
    batch, tokens, channels = latents.shape
    levels, per_byte = 2**bits - 1, 8 // bits
    exact = latents.to(torch.promote_types(latents.dtype, torch.float32))
    if per_token:
        groups, axis = exact.reshape(batch, tokens, channels // group, group), 3
    else:
        groups, axis = exact.reshape(batch, tokens // group, group, channels), 2
    low, high = groups.aminmax(dim=axis, keepdim=True)
    step = (high - low).clamp(min=SMALLEST_RANGE) / levels
    if clamped:
        low = (-(low / step).round()).clamp(0, levels)
        numbers = ((groups / step).round() + low).clamp(0, levels)
    else:
        numbers = ((groups - low) / step).round().clamp(0, levels)
    scale.copy_(step.squeeze(axis))
    offset.copy_(low.squeeze(axis))
    numbers = numbers.reshape(latents.shape).to(torch.uint8)
    numbers = torch.nn.functional.pad(numbers, (0, codes.shape[2] * per_byte - channels))
    places = torch.arange(0, 8, bits, device=latents.device, dtype=torch.uint8)
    codes.copy_((numbers.view(batch, tokens, codes.shape[2], per_byte) << places).sum(-1, dtype=torch.uint8))
