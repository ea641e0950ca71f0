"""Which token is compared with which, and how alike the two are (section 3.4, steps 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pared_kernels import framefusion_adjacent_cosine
from torch import Tensor

NO_PREDECESSOR = -2.0
UNDEFINED = -1.5
"""Similarity that stands for NaN: below every threshold, above having no predecessor."""


@dataclass(frozen=True)
class Order:
    """Tokens sorted by (stream, patch), within them by sequence: those without either first, ignored ones last."""

    index: Tensor
    """(batch, tokens) int64: which token is at each place."""
    follows: Tensor
    """(batch, tokens) bool: whether the token at a place has its predecessor at the place before."""


def sort_tokens(patch: Tensor, stream: Tensor, ignored: Tensor | None = None) -> Order:
    """Sort the tokens of each row; `patch`, `stream` (batch, tokens) int64, -1 outside; `ignored` bool like them."""
    width = patch.amax() + 2
    key = torch.where(patch >= 0, stream * width + patch, -1)
    if ignored is not None:
        key = key.masked_fill(ignored, torch.iinfo(torch.int64).max)
    index = key.argsort(dim=1, stable=True)
    placed = key.gather(1, index)
    same = (placed[:, 1:] == placed[:, :-1]) & (placed[:, 1:] >= 0)
    if ignored is not None:
        same &= ~ignored.gather(1, index)[:, 1:]
    return Order(index, torch.nn.functional.pad(same, (1, 0)))


def predecessors(order: Order) -> Tensor:
    """(batch, tokens) int64: for each token the one its similarity is measured to, or -1."""
    before = order.index.roll(1, 1)
    found = torch.where(order.follows, before, -1)
    return torch.empty_like(found).scatter_(1, order.index, found)


def predecessor(patch: Tensor, stream: Tensor) -> Tensor:
    """Index of the latest earlier position with the same (stream, patch), else -1.

    `patch`, `stream`: (batch, tokens) int64, -1 where the position is no vision token. Returns (batch, tokens) int64.
    """
    if patch.numel() == 0:
        return torch.empty_like(patch)
    return predecessors(sort_tokens(patch, torch.where(patch >= 0, stream, -1), None))


def adjacent_similarity(hidden: Tensor, prev: Tensor) -> Tensor:
    """Cosine similarity of each token with its predecessor, computed in float32.

    `hidden` (batch, tokens, channels) of any float dtype, `prev` (batch, tokens) int64. Returns (batch, tokens)
    float32: -2 where `prev` < 0, 0 where one of the two is zero, NaN where one has a NaN.
    """
    return framefusion_adjacent_cosine(hidden, prev)
