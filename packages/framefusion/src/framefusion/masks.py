"""Attention masks of shortened sequences: taken out of the model's own mask, or built from positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EAGER = "eager"


def is_flash(base: str) -> bool:
    """Whether an attention implementation takes masks of keys alone, (batch, keys)."""
    return "flash" in base


def as_mask(allowed: Tensor, base: str, dtype: torch.dtype) -> Tensor:
    """The mask (batch, 1, queries, keys) bool in the form that the implementation `base` takes."""
    if base != EAGER:
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def by_position(
    query_positions: Tensor,
    query_valid: Tensor | None,
    key_positions: Tensor,
    key_valid: Tensor | None,
    window: int | None,
) -> Tensor:
    """(batch, 1, queries, keys) bool: keys that are no padding, not later than the query, and inside the window.

    A query that is padding sees what lies at its own position, so that no row is empty.
    """
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if key_valid is not None:
        allowed &= key_valid[:, None, None, :]
    if query_valid is not None:
        # Padding queries come first, and so do their keys in the same order: the diagonal is their own.
        offset = key_positions.shape[1] - query_positions.shape[1]
        places = torch.arange(query_positions.shape[1], device=allowed.device)
        own = (places + offset)[:, None] == torch.arange(key_positions.shape[1], device=allowed.device)
        allowed |= own & ~query_valid[:, None, :, None]
    return allowed


def gathered(mask: Tensor, kept: Tensor, valid: Tensor | None) -> Tensor:
    """Rows and columns `kept` (batch, n) of a mask (batch or 1, heads or 1, N, >= N), bool or additive.

    Columns where `valid` (batch, n) is false are hidden; rows where it is see themselves.
    """
    batch, n = kept.shape
    wide = mask.expand(batch, -1, -1, -1)
    heads = wide.shape[1]
    rows = wide.gather(2, kept[:, None, :, None].expand(-1, heads, -1, wide.shape[3]))
    out = rows.gather(3, kept[:, None, None, :].expand(-1, heads, n, -1))
    if valid is None:
        return out
    own = torch.eye(n, dtype=torch.bool, device=mask.device) & ~valid[:, None, :, None]
    if out.dtype == torch.bool:
        return (out & valid[:, None, None, :]) | own
    hidden = torch.finfo(out.dtype).min
    return out.masked_fill(~valid[:, None, None, :], hidden).masked_fill(own, 0.0)


def widened(mask: Tensor, columns: int) -> Tensor:
    """The mask with hidden columns behind it, for the free slots of a static cache."""
    room = columns - mask.shape[-1]
    hidden: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.nn.functional.pad(mask, (0, room), value=hidden)
