"""What each stage decides for one sequence, from counts alone (section 3.2); the state it decides by is a `Budget`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from framefusion.config import FrameFusionConfig
from framefusion.functional.budget import remaining_budget, required_sparsity, survival

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
        self.tokens = self.total = tokens
        """Vision tokens present, and those of the prompt."""
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
                f"already spent more than it allows; pruned to min_keep, for a cost of {self._least():.3f}"
            )
            return Decision("prune", 0, None, 1.0)
        return self._prune(self._required(), None)

    def _required(self) -> float:
        return required_sparsity(self.fractions, self.config.cost, self.num_layers)

    def _overdrawn(self) -> bool:
        return remaining_budget(self.fractions, self.config.cost, self.num_layers) < 0

    def _least(self) -> float:
        """The average cost when `min_keep` tokens of every video are left for the layers to come."""
        left = min(self.config.min_keep * self.streams, self.tokens) / self.total
        return (sum(survival(self.fractions)) + (self.num_layers - len(self.fractions)) * left) / self.num_layers

    def _prune(self, cap: float, fraction: float | None) -> Decision:
        self.pruning_done = True
        return Decision("prune", 0, fraction, cap)
