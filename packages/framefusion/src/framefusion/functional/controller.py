"""The stages of one sequence (section 3.2): `Controller`."""

from __future__ import annotations

from torch import Tensor

from framefusion.config import FrameFusionConfig
from framefusion.functional.reducer import Reducer


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
