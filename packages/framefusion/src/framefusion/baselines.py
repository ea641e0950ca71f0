"""Other ways to have fewer video tokens, with the same handle: FastV, EVS, random, whole frames, a recent window.

Each drops tokens, none merges. All but FastV choose before the first layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pared_hooks import ConfigError
from torch import Tensor, nn

from framefusion.apply import FrameFusionHandle, install
from framefusion.config import FrameFusionConfig
from framefusion.functional.decision import Budget, Decision
from framefusion.functional.merging import defined, most_similar
from framefusion.functional.pruning import NOT_COMPETING, UNIMPORTANT
from framefusion.functional.reducer import Reducer
from framefusion.functional.selection import Selection
from framefusion.functional.similarity import adjacent_similarity, predecessor
from framefusion.layout import LayoutResolver, TokenLayout

Scores = Callable[["Dropper", Tensor, "Tensor | None"], Tensor]
"""(dropper, hidden (batch, n, channels), importance (batch, n) or None) -> (batch, n) float: the largest stay."""


class Dropper(Reducer):
    """Drops, at one stage, all but a share of the vision tokens of every row."""

    def __init__(
        self,
        layout: TokenLayout,
        valid: Tensor | None,
        budgets: list[Budget],
        *,
        keep: float,
        stage: int,
        scores: Scores,
        importance: bool = False,
    ) -> None:
        super().__init__(FrameFusionConfig(cost=1.0), layout.patch, layout.stream, len(budgets), valid, budgets)
        self.frame = layout.frame
        self._keep, self._stage, self._scores, self._needs = keep, stage, scores, importance
        self._now = 0

    @property
    def active(self) -> bool:
        """Whether its stage is still to come."""
        return self._now <= self._stage

    @property
    def wants_importance(self) -> bool:
        """Whether the next stage is the one, and goes by importance."""
        return self._needs and self._now == self._stage

    def step(self, hidden: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Selection | None]:
        """Count stages, and drop at the chosen one. A layer without attention puts off what needs importance."""
        self.last = [Decision("none")] * len(self.budgets)
        if self._now == self._stage and self._needs and importance is None:
            self._stage += 1
        if self._now != self._stage:
            self._now += 1
            return hidden, None
        self._now += 1
        vision = self.patch >= 0
        totals = [budget.tokens for budget in self.budgets]
        wanted = [round(total * self._keep) for total in totals]
        scores = self._scores(self, hidden, importance).masked_fill(~vision, NOT_COMPETING * 1e6)
        stay = most_similar(scores, torch.tensor(wanted, device=hidden.device)[:, None])
        self.last = [Decision("prune", count, None, 1.0 - self._keep) for count in wanted]
        dropped = [total - count for total, count in zip(totals, wanted, strict=True)]
        if not any(dropped):
            return hidden, None
        return self._apply(hidden, None, None, (vision & ~stay, dropped))


def apply_fastv(
    model: nn.Module, layer: int = 2, keep: float = 0.5, *, layout: TokenLayout | LayoutResolver | None = None
) -> FrameFusionHandle:
    """FastV (arXiv 2403.06764): layers from `layer` on see the `keep` tokens the last query attended to most before.

    Raises `ConfigError` for a layer below 1 or a share outside (0, 1], else what `framefusion.apply` raises.
    """
    _check("keep", keep)
    if layer < 1:
        raise ConfigError(f"layer = {layer!r} is not valid: at least 1, since attention of a layer is needed", "layer")

    def scores(dropper: Dropper, hidden: Tensor, importance: Tensor | None) -> Tensor:
        assert importance is not None
        return importance.nan_to_num(nan=UNIMPORTANT)

    return _install(model, "fastv", layout, keep=keep, stage=layer, scores=scores, importance=True)


def apply_evs(
    model: nn.Module, rate: float = 0.7, *, layout: TokenLayout | LayoutResolver | None = None
) -> FrameFusionHandle:
    """EVS (efficient video sampling): drop the share `rate` of the tokens most like those of the frame before.

    The first frame has nothing before it and stays. Raises as `apply_fastv` does.
    """
    _check("1 - rate", 1.0 - rate)

    def scores(dropper: Dropper, hidden: Tensor, importance: Tensor | None) -> Tensor:
        return -defined(adjacent_similarity(hidden, predecessor(dropper.patch, dropper.stream)))

    return _install(model, "evs", layout, keep=1.0 - rate, stage=0, scores=scores)


def apply_random(
    model: nn.Module,
    rate: float = 0.7,
    generator: torch.Generator | None = None,
    *,
    layout: TokenLayout | LayoutResolver | None = None,
) -> FrameFusionHandle:
    """Drop a random share `rate` of the tokens; numbers come from `generator` on the CPU. Raises as `apply_fastv`."""
    _check("1 - rate", 1.0 - rate)
    draw = generator or torch.Generator().manual_seed(0)

    def scores(dropper: Dropper, hidden: Tensor, importance: Tensor | None) -> Tensor:
        return torch.rand(hidden.shape[:2], generator=draw).to(hidden.device)

    return _install(model, "random", layout, keep=1.0 - rate, stage=0, scores=scores)


def apply_frame_subsample(
    model: nn.Module, keep: float = 0.3, *, layout: TokenLayout | LayoutResolver | None = None
) -> FrameFusionHandle:
    """Keep `keep` of the tokens as whole frames, spread evenly over each video; the last one in part.

    Raises as `apply_fastv` does.
    """
    _check("keep", keep)

    def scores(dropper: Dropper, hidden: Tensor, importance: Tensor | None) -> Tensor:
        # Frame t of T is taken when (t + 1) keep passes an integer that t keep has not: evenly spread, T keep of them.
        turn = (dropper.frame + 1).float() * keep
        taken = turn.floor() > (turn - keep).floor()
        # Behind them, in part, whole frames from the last one on.
        return torch.where(taken, dropper.frame.amax(1, keepdim=True) + 1, dropper.frame).float()

    return _install(model, "frames", layout, keep=keep, stage=0, scores=scores)


def apply_window(
    model: nn.Module, keep: float = 0.3, sinks: int = 4, *, layout: TokenLayout | LayoutResolver | None = None
) -> FrameFusionHandle:
    """Keep the first `sinks` vision tokens and the latest ones, `keep` in all, as StreamingLLM (2309.17453) does.

    Raises as `apply_fastv` does.
    """
    _check("keep", keep)

    def scores(dropper: Dropper, hidden: Tensor, importance: Tensor | None) -> Tensor:
        rank = (dropper.patch >= 0).cumsum(1).float()
        return torch.where(rank <= sinks, rank + hidden.shape[1], rank)

    return _install(model, "window", layout, keep=keep, stage=0, scores=scores)


def fastv_share(cost: float, layer: int, num_layers: int) -> float:
    """The share to keep from `layer` on for an average of `cost` over all layers; at least one token is kept."""
    return max(0.0, (num_layers * cost - layer) / (num_layers - layer))


def _check(name: str, keep: float) -> None:
    if not 0 < keep <= 1:
        raise ConfigError(f"{name} = {keep!r} is not valid: a share in (0, 1]", name)


def _install(
    model: nn.Module,
    owner: str,
    layout: TokenLayout | LayoutResolver | None,
    *,
    keep: float,
    stage: int,
    scores: Scores,
    importance: bool = False,
) -> FrameFusionHandle:
    def strategy(layout: TokenLayout, valid: Tensor | None, budgets: list[Budget]) -> Reducer:
        return Dropper(layout, valid, budgets, keep=keep, stage=stage, scores=scores, importance=importance)

    return install(model, FrameFusionConfig(cost=1.0), strategy, layout, f"framefusion.{owner}")
