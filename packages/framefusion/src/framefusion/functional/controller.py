"""The stages of section 3.2: what each one decides, for the rows of a batch, and the rows it leaves.

A `Reducer` carries a batch through the stages; every row has a `Budget` of its own. `Controller` is the same for one
sequence.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pared_kernels import framefusion_segment_mean_compact
from torch import Tensor

from framefusion.config import FrameFusionConfig
from framefusion.functional.budget import remaining_budget, required_sparsity
from framefusion.functional.merging import defined, most_similar
from framefusion.functional.pruning import NOT_COMPETING, UNIMPORTANT, kept_count
from framefusion.functional.similarity import Order, adjacent_similarity, predecessors, sort_tokens

PROTECTED = 4.0
"""What the importance of a token is raised by when it must stay."""

Kind = Literal["none", "merge", "capped", "prune"]


@dataclass(frozen=True)
class Decision:
    """What a stage does to one row: `amount` tokens are merged (merge, capped) or left of the candidates (prune)."""

    kind: Kind
    amount: int = 0
    fraction: float | None = None
    """Share of the vision tokens that a merge stage found alike."""
    cap: float | None = None
    """Required sparsity at this stage."""


class Budget:
    """The state of one row: fractions removed so far, what is done, and the numbers of tokens, all on the host."""

    def __init__(self, config: FrameFusionConfig, num_layers: int, tokens: int, patches: int, streams: int = 1) -> None:
        self.config = config
        self.num_layers = config.budget_layers or num_layers
        self.fractions: list[float] = []
        self.merging_done = self.pruning_done = tokens == 0
        self.tokens = tokens
        """Vision tokens present."""
        self.patches = patches
        """Pairs of stream and patch. The first token of each has no predecessor and survives every merge."""
        self.streams = streams
        """Independent videos."""
        self.warning = ""

    @property
    def paired(self) -> int:
        """Vision tokens that have a predecessor."""
        return self.tokens - self.patches

    @property
    def exhausted(self) -> bool:
        """Whether every layer's slot is recorded, so that no stage is left."""
        return len(self.fractions) >= self.num_layers

    @property
    def active(self) -> bool:
        """Whether a stage may still change this row."""
        return not self.exhausted and not (self.merging_done and self.pruning_done)

    @property
    def needs_count(self) -> bool:
        """Whether the next stage must know how many tokens reach the threshold."""
        return self.active and not self.merging_done and self.config.merge_ratios is None

    @property
    def wants_importance(self) -> bool:
        """Whether the next stage prunes, or may have to."""
        if not self.active:
            return False
        if self.merging_done:
            return True
        # Unless something is merged the next slot costs as much as the last one; "force" then prunes at once.
        return self.config.on_budget == "force" and bool(self.fractions) and self._overdraws(0.0)

    def decide(self, alike: int, has_importance: bool) -> Decision:
        """What the next stage does, given how many tokens reach the threshold; records it.

        Raises `BudgetError` when the budget cannot be met and `on_budget` is "error".
        """
        if not self.active:
            return Decision("none")
        if self.merging_done:
            return self._prune_stage(has_importance)
        cap = required_sparsity(self.fractions, self.config.cost, self.num_layers)
        if self.config.merge_ratios is not None:
            return self._fixed_stage(cap)
        fraction = alike / self.tokens
        if fraction >= cap:
            return self._cap(cap, fraction)
        if self._overdraws(fraction):
            return self._at_once(cap, fraction, has_importance)
        self._append(fraction)
        self.merging_done = fraction < self.config.merge_floor
        self.tokens -= alike
        return Decision("merge", alike, fraction, cap)

    def _overdraws(self, fraction: float) -> bool:
        return remaining_budget([*self.fractions, fraction], self.config.cost, self.num_layers) < 0

    def _append(self, fraction: float) -> None:
        self.fractions.append(fraction)

    def _cap(self, cap: float, fraction: float) -> Decision:
        """Merge as many as the budget needs; the next stage prunes when too few have a predecessor."""
        wanted = int(cap * self.tokens)
        amount = min(wanted, self.paired)
        self.merging_done = True
        if amount < wanted:
            achieved = amount / self.tokens
            if self.config.on_budget == "error" and self._overdraws(achieved):
                required_sparsity([*self.fractions, achieved], self.config.cost, self.num_layers)
            self._append(achieved)
        else:
            self.pruning_done = True
        self.tokens -= amount
        return Decision("capped", amount, fraction, cap)

    def _at_once(self, cap: float, fraction: float, has_importance: bool) -> Decision:
        if self.config.on_budget == "error":
            required_sparsity([*self.fractions, fraction], self.config.cost, self.num_layers)
        if not has_importance:
            return self._cap(cap, fraction)
        self.merging_done = True
        return self._prune(cap, fraction)

    def _fixed_stage(self, cap: float) -> Decision:
        ratios = self.config.merge_ratios
        assert ratios is not None
        ratio = ratios[len(self.fractions)]
        if ratio >= cap:
            return self._cap(cap, ratio)
        amount = min(int(ratio * self.tokens), self.paired)
        achieved = amount / self.tokens
        if self._overdraws(achieved):
            return self._at_once(cap, achieved, False)
        self._append(achieved)
        self.merging_done = len(self.fractions) == len(ratios)
        self.tokens -= amount
        return Decision("merge", amount, achieved, cap)

    def _prune_stage(self, has_importance: bool) -> Decision:
        if not has_importance:
            # A layer without attention: pruning waits for the next one, and this layer's slot is spent.
            if self._overdraws(0.0):
                cap = 1.0 if self._overdrawn() else self._required()
                return self._cap(cap, 0.0)
            self._append(0.0)
            return Decision("none")
        if self._overdrawn():
            if self.config.on_budget == "error":
                self._required()
            self.pruning_done = True
            self.warning = (
                f"cost = {self.config.cost} cannot be met: {len(self.fractions)} of {self.num_layers} layers have "
                "already spent more than it allows; pruned to min_keep"
            )
            return Decision("prune", 0, None, 1.0)
        return self._prune(self._required(), None)

    def _required(self) -> float:
        return required_sparsity(self.fractions, self.config.cost, self.num_layers)

    def _overdrawn(self) -> bool:
        return remaining_budget(self.fractions, self.config.cost, self.num_layers) < 0

    def _prune(self, cap: float, fraction: float | None) -> Decision:
        self.pruning_done = True
        return Decision("prune", 0, fraction, cap)


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
        for budget in self.budgets:
            if budget.warning:
                warnings.warn(budget.warning, stacklevel=2)
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


class Controller:
    """The stages of one sequence. `patch` and `stream` (tokens,) or (1, tokens) int64, -1 where no vision token is.

    `num_layers` is the depth that `cost` is averaged over, unless the config has `budget_layers`.
    """

    def __init__(self, cfg: FrameFusionConfig, patch: Tensor, stream: Tensor, num_layers: int) -> None:
        self._reducer = Reducer(cfg, patch.reshape(1, -1), stream.reshape(1, -1), num_layers)

    @property
    def fractions(self) -> list[float]:
        """Share of the present vision tokens that each recorded stage removed."""
        return self._reducer.budgets[0].fractions

    @property
    def merging_done(self) -> bool:
        """Whether no later stage merges."""
        return self._reducer.budgets[0].merging_done

    @property
    def pruning_done(self) -> bool:
        """Whether no later stage removes anything."""
        return self._reducer.budgets[0].pruning_done

    @property
    def wants_importance(self) -> bool:
        """Whether the next stage prunes, or may have to, and needs the importance of the tokens for it."""
        return self._reducer.wants_importance

    def step(self, hidden: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run one stage on hidden states (1, n, channels), with importance (1, n) float32 where it is wanted.

        Returns the hidden states that are left, (1, n', channels), and (n',) int64, their places in the original
        sequence. Raises `BudgetError` when the budget cannot be met and `on_budget` is "error", and ValueError when
        pruning is due and `importance` is missing.
        """
        budget = self._reducer.budgets[0]
        if importance is None and budget.active and budget.merging_done:
            raise ValueError("importance is None at a stage that prunes; valid: a tensor (1, n), see wants_importance")
        shorter, _ = self._reducer.step(hidden, importance)
        return shorter, self._reducer.positions[0]
