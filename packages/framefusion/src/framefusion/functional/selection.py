"""Which rows of a batch are left after a stage, and how their hidden states are made of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pared_kernels import framefusion_segment_mean_compact
from torch import Tensor

from framefusion.functional.similarity import Order


@dataclass
class Selection:
    """What a stage leaves of the rows of a batch, and how to make hidden states of it."""

    source: Tensor
    """(batch, n') int64: where each row was."""
    valid: Tensor | None
    """(batch, n') bool: rows that are no padding; None when none is."""
    group: Tensor
    """(batch, n) int64: the new row that each old one went into, -1 for those that vanished."""
    segments: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None
    """Order, starts, places and weights of the groups to average; None when nothing is merged."""

    def apply(self, hidden: Tensor) -> Tensor:
        """Hidden states (batch, n, channels) -> (batch, n', channels), zero where a row is padding."""
        if self.segments is None:
            shorter = take(hidden, self.source)
        else:
            shorter = framefusion_segment_mean_compact(hidden, *self.segments)
        return shorter if self.valid is None else shorter * self.valid[..., None].to(shorter.dtype)


def compact(gone: Tensor, merged: Tensor | None, order: Order | None, lengths: Sequence[int]) -> Selection:
    """Where the rows come from that are neither `gone` nor `merged`, both (batch, n) bool, left-padded to the longest.

    `lengths` are the numbers of rows left; `order` says whom a merged token joins.
    """
    stays = ~gone if merged is None else ~gone & ~merged
    longest = max(lengths)
    # Stable: those that stay come last, in sequence order.
    source = stays.to(torch.int8).argsort(dim=1, stable=True)[:, stays.shape[1] - longest :]
    valid = None
    if min(lengths) < longest:
        pad = torch.tensor([longest - length for length in lengths], device=gone.device)[:, None]
        valid = torch.arange(longest, device=gone.device) >= pad
    rank = stays.cumsum(1) - 1
    if valid is not None:
        rank = rank + pad
    group = torch.where(stays, rank, -1)
    if merged is not None and order is not None:
        place = torch.arange(stays.shape[1], device=gone.device)
        anchor_place = torch.where(merged.gather(1, order.index), -1, place).cummax(1).values
        anchor = torch.empty_like(order.index).scatter_(1, order.index, order.index.gather(1, anchor_place))
        group = torch.where(gone, -1, group.gather(1, anchor))
    return Selection(source, valid, group)


def take(rows: Tensor, source: Tensor) -> Tensor:
    """Rows `source` (batch, n') of a tensor (batch, n, channels)."""
    return rows.gather(1, source[..., None].expand(-1, -1, rows.shape[-1]))
