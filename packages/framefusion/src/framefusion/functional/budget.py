"""The budget of section 3.3: which share of the tokens the next stage must remove for the average to come out."""

from __future__ import annotations

from collections.abc import Sequence

from framefusion.errors import BudgetError


def survival(fractions: Sequence[float]) -> list[float]:
    """s_i = prod_{j <= i} (1 - f_j): the share of the vision tokens present after each recorded stage."""
    present, shares = 1.0, []
    for fraction in fractions:
        present *= 1.0 - fraction
        shares.append(present)
    return shares


def remaining_budget(fractions: Sequence[float], cost: float, num_layers: int) -> float:
    """L * cost - sum_i s_i: layers' worth of all vision tokens that are left to spend; negative when overdrawn."""
    return num_layers * cost - sum(survival(fractions))


def required_sparsity(fractions: Sequence[float], cost: float, num_layers: int) -> float:
    """Share of the present vision tokens that the next stage must remove so that the average over layers is `cost`.

    `fractions` are the shares removed by the stages so far, `num_layers` is L. With m recorded stages:
    1 - remaining / ((L - m) s_m), at least 0; 0 when no layer is left. Raises `BudgetError` when remaining < 0.
    """
    remaining = remaining_budget(fractions, cost, num_layers)
    if remaining < 0:
        raise BudgetError(
            f"cost = {cost!r} is too small: the first {len(fractions)} of {num_layers} layers have used "
            f"{num_layers * cost - remaining:.3f} layers' worth of vision tokens, {num_layers * cost:.3f} were allowed"
        )
    layers_left = num_layers - len(fractions)
    shares = survival(fractions)
    present = shares[-1] if shares else 1.0
    if layers_left <= 0 or present <= 0:
        return 0.0
    return max(0.0, 1.0 - remaining / (layers_left * present))
