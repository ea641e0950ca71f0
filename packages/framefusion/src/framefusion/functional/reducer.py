"""A batch on its way through the stages: which tokens are merged or pruned, as the budgets of its rows say."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from framefusion.config import FrameFusionConfig
from framefusion.functional.decision import Budget, Decision
from framefusion.functional.merging import defined, most_similar
from framefusion.functional.pruning import NOT_COMPETING, UNIMPORTANT, kept_count
from framefusion.functional.selection import Selection, compact
from framefusion.functional.similarity import Order, adjacent_similarity, predecessors, sort_tokens

PROTECTED = 4.0
"""What the importance of a token is raised by when it must stay."""


@dataclass
class Reducer:
    """Carries a batch of sequences through the stages.

    `patch`, `stream` (batch, tokens) int64, -1 outside; `valid` (batch, tokens) bool, or None when nothing is padding.
    The `budgets` are counted from the tensors, with one synchronisation, unless given.
    """

    config: FrameFusionConfig
    patch: Tensor
    stream: Tensor
    num_layers: int
    valid: Tensor | None = None
    budgets: list[Budget] = field(default_factory=list)

    def __post_init__(self) -> None:
        batch, tokens = self.patch.shape
        self.positions = torch.arange(tokens, device=self.patch.device).expand(batch, -1)
        self.size = torch.ones_like(self.patch) if self.config.average == "weighted" else None
        if not self.budgets:
            self.budgets = [Budget(self.config, self.num_layers, *one) for one in count_tokens(self.patch, self.stream)]
        self.lengths = [tokens] * batch if self.valid is None else self.valid.sum(1).tolist()
        if self.valid is not None and min(self.lengths) == tokens:
            self.valid = None
        self.last: list[Decision] = []
        self._present: list[int] = []
        vision = self.patch >= 0
        first = torch.where(vision, self.positions, tokens).amin(1, keepdim=True)
        final = torch.where(vision, self.positions, -1).amax(1, keepdim=True)
        self._span = (first, final)

    @property
    def active(self) -> bool:
        """Whether a later stage may change anything."""
        return any(budget.active for budget in self.budgets)

    @property
    def wants_importance(self) -> bool:
        """Whether the next stage should be given the importance of the tokens."""
        return any(budget.wants_importance for budget in self.budgets)

    def step(self, hidden: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Selection | None]:
        """Run one stage on hidden states (batch, n, channels) and, where wanted, importance (batch, n) float32.

        Returns the hidden states of the rows that are left, padded on the left to the longest, and where they come
        from; None when nothing changed. Raises `BudgetError` as `on_budget` says.
        """
        self.last = []
        if not self.active:
            return hidden, None
        order = scores = None
        alike = [0] * len(self.budgets)
        merging = [budget.active and not budget.merging_done for budget in self.budgets]
        if any(merging) or importance is None:
            order = sort_tokens(self.patch, self.stream, None if self.valid is None else ~self.valid)
            prev = predecessors(order)
            scores = defined(adjacent_similarity(hidden, prev))
            if any(budget.needs_count for budget in self.budgets):
                reached = (prev >= 0) & (scores >= self.config.similarity_threshold)
                alike = reached.sum(1).tolist()
        self._present = [budget.tokens for budget in self.budgets]
        self.last = [
            budget.decide(count, importance is not None) for budget, count in zip(self.budgets, alike, strict=True)
        ]
        for text in dict.fromkeys(one.warning for one in self.budgets if one.warning):
            warnings.warn(text, stacklevel=2)
        for budget in self.budgets:
            budget.warning = ""
        merged = self._merged(scores)
        pruned = self._pruned(importance)
        if merged is None and pruned is None:
            return hidden, None
        return self._apply(hidden, order, merged, pruned)

    def _merged(self, scores: Tensor | None) -> Tensor | None:
        """(batch, n) bool: rows that join their predecessor."""
        amounts = [one.amount if one.kind in ("merge", "capped") else 0 for one in self.last]
        if scores is None or not any(amounts):
            return None
        # The tokens above the threshold are the most similar ones: one ranking serves both rules.
        return most_similar(scores, torch.tensor(amounts, device=scores.device)[:, None])

    def _pruned(self, importance: Tensor | None) -> tuple[Tensor, list[int]] | None:
        """(batch, n) bool: rows that are dropped, and how many they are by sequence."""
        if importance is None or not any(one.kind == "prune" for one in self.last):
            return None
        candidates = self._candidates()
        totals = list(self._present)
        if self.config.prune_scope == "span":
            totals = candidates.sum(1).tolist()
        scores = importance.nan_to_num(nan=UNIMPORTANT).masked_fill(~candidates, NOT_COMPETING)
        scores, least = self._protect(scores, candidates)
        wanted = list(totals)
        for row, one in enumerate(self.last):
            if one.kind == "prune" and one.cap is not None:
                wanted[row] = min(max(kept_count(totals[row], one.cap), least[row]), totals[row])
                self.last[row] = replace(one, amount=wanted[row])
        keep = most_similar(scores, torch.tensor(wanted, device=scores.device)[:, None])
        return candidates & ~keep, [total - kept for total, kept in zip(totals, wanted, strict=True)]

    def _candidates(self) -> Tensor:
        if self.config.prune_scope == "vision":
            return self.patch >= 0
        first, final = self._span
        inside = (self.positions >= first) & (self.positions <= final)
        return inside if self.valid is None else inside & self.valid

    def _protect(self, scores: Tensor, candidates: Tensor) -> tuple[Tensor, list[int]]:
        """Raise the `min_keep` most important vision tokens of every stream above all others; their number by row."""
        if self.config.min_keep == 0:
            return scores, [0] * len(self.budgets)
        if self.config.prune_scope == "vision" and all(budget.streams <= 1 for budget in self.budgets):
            return scores, [self.config.min_keep] * len(self.budgets)
        streams = torch.where(candidates & (self.patch >= 0), self.stream, -1)
        ranked = scores.argsort(dim=1, descending=True, stable=True)
        placed = streams.gather(1, ranked)
        by_stream = placed.argsort(dim=1, stable=True)
        sorted_streams = placed.gather(1, by_stream)
        place = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        begins = torch.nn.functional.pad(sorted_streams[:, 1:] != sorted_streams[:, :-1], (1, 0), value=True)
        rank = place - torch.where(begins, place, 0).cummax(1).values
        safe = (rank < self.config.min_keep) & (sorted_streams >= 0)
        flags = torch.zeros_like(safe).scatter_(1, ranked.gather(1, by_stream), safe)
        return torch.where(flags, scores + PROTECTED, scores), flags.sum(1).tolist()

    def _apply(
        self, hidden: Tensor, order: Order | None, merged: Tensor | None, pruned: tuple[Tensor, list[int]] | None
    ) -> tuple[Tensor, Selection]:
        """Take the chosen rows out, and padding with them; average the merged ones into their anchors."""
        gone = torch.zeros_like(self.patch, dtype=torch.bool) if self.valid is None else ~self.valid
        for row, decision in enumerate(self.last):
            if decision.kind in ("merge", "capped"):
                self.lengths[row] -= decision.amount
        if pruned is not None:
            gone = gone | pruned[0]
            for row, count in enumerate(pruned[1]):
                self.lengths[row] -= count
                if count:
                    self.budgets[row].tokens -= count
        selection = compact(gone, merged, order, self.lengths)
        if merged is not None and order is not None:
            selection.segments = self._segments(hidden, order, merged, gone, selection)
        if self.size is not None:
            totals = torch.zeros_like(selection.source)
            inside = (selection.group >= 0).to(self.size.dtype)
            self.size = totals.scatter_add(1, selection.group.clamp(min=0), self.size * inside)
        self.positions, self.patch, self.stream = (
            one.gather(1, selection.source) for one in (self.positions, self.patch, self.stream)
        )
        self.valid = selection.valid
        if self.valid is not None:
            self.patch = self.patch.masked_fill(~self.valid, -1)
            self.stream = self.stream.masked_fill(~self.valid, -1)
        return selection.apply(hidden), selection

    def _segments(
        self, hidden: Tensor, order: Order, merged: Tensor, gone: Tensor, selection: Selection
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Segments are the anchors with the members that follow them in the order."""
        rows = selection.source.shape[1]
        absent = gone.gather(1, order.index)
        # Tokens that are gone must lie in no segment: move them behind, where the segments end.
        behind = absent.to(torch.int8).argsort(dim=1, stable=True)
        index, absent = order.index.gather(1, behind), absent.gather(1, behind)
        starts = ~merged.gather(1, index) & ~absent
        place = torch.arange(index.shape[1], device=index.device).expand_as(index)
        end = (~absent).sum(1, keepdim=True)
        first = torch.where(starts, place, end).sort(1).values[:, :rows]
        seg_start = torch.cat((first, end), 1)
        anchor = index.gather(1, first.clamp(max=index.shape[1] - 1))
        # Rows that are padding get the empty segments behind the last.
        spare = torch.arange(rows, device=index.device).expand_as(first)
        real = first < end
        count = real.sum(1, keepdim=True)
        out_index = torch.where(real, selection.group.gather(1, anchor), spare - count)
        weight = None if self.size is None else self.size.to(torch.promote_types(hidden.dtype, torch.float32))
        return index, seg_start, out_index, weight


def count_tokens(patch: Tensor, stream: Tensor) -> list[tuple[int, int, int]]:
    """Vision tokens, distinct pairs of stream and patch, and distinct streams of each row; one synchronisation."""
    if patch.numel() == 0:
        return [(0, 0, 0)] * patch.shape[0]
    vision = patch >= 0
    videos = torch.where(vision, stream, -1)
    first = ~sort_tokens(patch, videos).follows
    ranked = videos.sort(1).values
    distinct = torch.nn.functional.pad(ranked[:, 1:] != ranked[:, :-1], (1, 0), value=True) & (ranked >= 0)
    counts = torch.stack((vision.sum(1), first.sum(1) - (~vision).sum(1), distinct.sum(1)), 1).tolist()
    return [(tokens, patches, streams) for tokens, patches, streams in counts]
