"""Base-token selection step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import noise


def dato_score_select(
    current: Tensor,
    previous: Tensor | None,
    grid_height: int,
    grid_width: int,
    patch_height: int,
    patch_width: int,
    gamma: float,
    alpha: float,
    normalize: bool,
    seed: int,
    call: int,
    block: int,
    groups: int,
) -> Tensor:
    """Return what `pared_kernels.dato_score_select` does; `groups` divides the batch."""
    deciding = current.shape[0] // groups
    score = dynamics(current[:deciding], None if previous is None else previous[:deciding], grid_height, grid_width)
    if normalize:
        mean = score.mean(dim=1, keepdim=True)
        score = torch.where(mean > 0, score / mean, 0.0)
    score = gamma * score
    if alpha != 0:
        score = score + alpha * noise(deciding, score.shape[1], seed, call, block, score.device).to(score.dtype)
    rows, columns = grid_height // patch_height, grid_width // patch_width
    score = score.view(deciding, grid_height, grid_width)[:, : rows * patch_height, : columns * patch_width]
    score = score.reshape(deciding, rows, patch_height, columns, patch_width).transpose(2, 3).flatten(3)
    offset = score.argmax(dim=-1)
    patch_row = torch.arange(rows, device=score.device)[:, None] * patch_height
    patch_column = torch.arange(columns, device=score.device) * patch_width
    token = (patch_row + offset // patch_width) * grid_width + patch_column + offset % patch_width
    return token.flatten(1).repeat(groups, 1)


def dynamics(current: Tensor, previous: Tensor | None, grid_height: int, grid_width: int) -> Tensor:
    """Return D, the mean |current - previous| over channels and pixels of each token, (batch, h * w); 0 for None."""
    dtype = torch.promote_types(current.dtype, torch.float32)
    batch, channels, height, width = current.shape
    if previous is None:
        return torch.zeros(batch, grid_height * grid_width, dtype=dtype, device=current.device)
    change = (current.to(dtype) - previous.to(dtype)).abs()
    pixels = (batch, channels, grid_height, height // grid_height, grid_width, width // grid_width)
    score = change.reshape(pixels).mean(dim=(1, 3, 5)).flatten(1)
    return torch.where(score.isfinite(), score, 0.0)
