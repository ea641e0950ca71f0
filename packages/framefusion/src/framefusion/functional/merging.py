"""What a stage merges, and the mean of what it merges (section 3.4, steps 3 to 7)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from framefusion.functional.similarity import NO_PREDECESSOR, UNDEFINED


class MergeChoice(NamedTuple):
    """The tokens that join their predecessor, and how the choice came about."""

    mask: Tensor
    """(tokens,) bool: the tokens that vanish."""
    fraction: float
    """Share of the vision tokens whose similarity reaches the threshold."""
    capped: bool
    """Whether the budget, not the threshold, decided how many."""


class Merged(NamedTuple):
    """Hidden states after merging, before the merged rows are taken out."""

    hidden: Tensor
    """(batch, tokens, channels): the mean at the anchors, every other row as it was."""
    keep: Tensor
    """(batch, tokens) bool: the rows that stay."""
    anchor: Tensor
    """(batch, tokens) int64: the row each one joined; itself where it stays."""
    size: Tensor
    """(batch, tokens) int64: how many tokens a row stands for."""


def defined(similarity: Tensor) -> Tensor:
    """`similarity` with NaN replaced by a value below every threshold."""
    return similarity.nan_to_num(nan=UNDEFINED)


def most_similar(similarity: Tensor, count: Tensor | int) -> Tensor:
    """(..., tokens) bool: the `count` largest along the last dimension, ties to the lower position.

    `count` is an int, or an integer tensor that broadcasts against `similarity`.
    """
    places = similarity.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(similarity.shape[-1], device=similarity.device).expand_as(places)
    return torch.empty_like(places).scatter_(-1, places, ranks) < count


def choose_merges(sim: Tensor, prev: Tensor, vision: Tensor, threshold: float, cap: float) -> MergeChoice:
    """Choose the tokens of one row that are merged at this stage.

    `sim` (tokens,) float, `prev` (tokens,) int64, `vision` (tokens,) bool; `cap` is the required sparsity. Where fewer
    than `cap` of the vision tokens reach `threshold`, these are the choice; else it is the min(int(cap * n), tokens
    with a predecessor) most similar ones, whatever the threshold.
    """
    alike = vision & (prev >= 0) & (defined(sim) >= threshold)
    total, found, paired = torch.stack((vision.sum(), alike.sum(), (vision & (prev >= 0)).sum())).tolist()
    fraction = found / total if total else 0.0
    if fraction < cap:
        return MergeChoice(alike, fraction, False)
    scores = defined(sim).masked_fill(~(vision & (prev >= 0)), NO_PREDECESSOR)
    return MergeChoice(most_similar(scores, min(int(cap * total), paired)), fraction, True)


def anchors(prev: Tensor, mask: Tensor) -> Tensor:
    """(batch, tokens) int64: the last unmerged token along each token's chain of predecessors; itself if unmerged."""
    places = torch.arange(prev.shape[1], device=prev.device).expand_as(prev)
    target = torch.where(mask, prev, places)
    # Pointer doubling: after k rounds chains of 2**k members are resolved.
    for _ in range(max(prev.shape[1] - 1, 1).bit_length()):
        target = target.gather(1, target)
    return target


def merge(hidden: Tensor, prev: Tensor, mask: Tensor, size: Tensor | None = None) -> Merged:
    """Average every chain of merged tokens into the unmerged token before it.

    `hidden` (batch, tokens, channels), `prev` (batch, tokens) int64, `mask` (batch, tokens) bool, false where `prev` is
    -1. With `size` (batch, tokens) int64 the mean weighs each row by it. The sums are float32 (float64 for float64)
    and the inputs stay as they are.
    """
    anchor = anchors(prev, mask)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counts = torch.ones_like(prev) if size is None else size
    weights = torch.ones_like(prev, dtype=wide) if size is None else size.to(wide)
    totals = torch.zeros_like(weights).scatter_add_(1, anchor, weights)
    where = anchor[..., None].expand_as(hidden)
    sums = torch.zeros_like(hidden, dtype=wide).scatter_add_(1, where, hidden.to(wide) * weights[..., None])
    joined = torch.zeros_like(prev).scatter_add_(1, anchor, mask.to(prev.dtype))
    mean = (sums / totals.clamp(min=1)[..., None]).to(hidden.dtype)
    merged = torch.where(joined[..., None] > 0, mean, hidden)
    counted = torch.zeros_like(counts).scatter_add_(1, anchor, counts)
    return Merged(merged, ~mask, anchor, torch.where(mask, counts, counted))
