"""The integer programme of one step and layer: which method each head takes (section 3.3), solved exactly.

The problem is a multiple-choice knapsack. Heads are added one after the other; of the partial choices only those stay
that no other one beats in both error and saving, and whose best possible completion, that of the linear relaxation,
reaches what is certainly possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

SAVING_BITS, ERROR_BITS = 53, 62
"""Savings and errors become integers of this precision, so that sums are exact and ties are ties."""


@dataclass(frozen=True)
class Choice:
    """One method of one head, in integers; `method` -1 is full attention."""

    error: int
    saving: int
    method: int


def solve(errors: NDArray[np.float64], savings: NDArray[np.float64], delta: float, limit: float) -> list[int]:
    """Return the method of each head: most saving, then least error, then lowest methods, head by head.

    `errors` (heads, methods) of at least 0, `savings` (methods,) from 0 to 1, `delta` > 0 bounds the sum of errors and
    `limit` (exclusive) each of them.
    """
    scale = ERROR_BITS - np.frexp(delta)[1]
    budget = round(np.ldexp(delta, scale))
    heads = [
        _undominated(
            [Choice(0, 0, -1)]
            + [
                Choice(round(np.ldexp(error, scale)), round(np.ldexp(saving, SAVING_BITS)), method)
                for method, (error, saving) in enumerate(zip(row, savings, strict=True))
                if error < limit and error <= delta
            ]
        )
        for row in errors.tolist()
    ]
    return _search(heads, budget)


def _undominated(choices: list[Choice]) -> list[Choice]:
    """Return the choices that no other one beats, by rising error and saving."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda one: (one.error, -one.saving, one.method)):
        if not kept or choice.saving > kept[-1].saving:
            kept.append(choice)
    return kept


def _search(heads: list[list[Choice]], budget: int) -> list[int]:
    error, saving = np.zeros(1, np.int64), np.zeros(1, np.int64)
    steps: list[tuple[Integers, Integers]] = []
    certain = 0
    for number, choices in enumerate(heads):
        count = len(choices)
        # Partial choices are kept in lexicographic order of their methods, and so are their continuations.
        choices = sorted(choices, key=lambda one: one.method)
        error = (error[:, None] + np.array([one.error for one in choices])).ravel()
        saving = (saving[:, None] + np.array([one.saving for one in choices])).ravel()
        rest_errors, rest_savings = _relaxed(heads[number + 1 :])
        left = budget - error
        fits = left >= 0
        reached = np.searchsorted(rest_errors, np.maximum(left, 0), side="right") - 1
        certain = max(certain, int((saving + rest_savings[reached])[fits].max()))
        kept = np.flatnonzero(fits & (_bound(left, saving, reached, rest_errors, rest_savings) >= certain))
        kept = kept[_front(error[kept], saving[kept])]
        steps.append((kept // count, np.array([one.method for one in choices])[kept % count]))
        error, saving = error[kept], saving[kept]
    place = int(np.lexsort((error, -saving))[0])
    methods = []
    for parents, chosen in reversed(steps):
        methods.append(int(chosen[place]))
        place = int(parents[place])
    return methods[::-1]


def _front(error: Integers, saving: Integers) -> Integers:
    """Return the places, in order, of the choices that no other one beats; of equal ones the first."""
    order = np.lexsort((np.arange(len(error)), error, -saving))
    best = np.minimum.accumulate(error[order])
    new = np.ones(len(order), bool)
    new[1:] = error[order][1:] < best[:-1]
    return np.sort(order[new])


def _relaxed(heads: list[list[Choice]]) -> tuple[Integers, Integers]:
    """Return error and saving of the corners of the linear relaxation, from nothing on, by falling efficiency."""
    steps = [step for choices in heads for step in _hull_steps(choices)]
    steps.sort(key=lambda one: -(one[1] / max(one[0], 0.5)))
    corners = np.zeros((len(steps) + 1, 2), np.int64)
    total_error = total_saving = 0
    for place, (error, saving) in enumerate(steps, start=1):
        # Beyond the budget the sum may leave the range of int64; nothing there is ever reached.
        total_error = min(total_error + error, 2**63 - 1)
        total_saving += saving
        corners[place] = total_error, total_saving
    return corners[:, 0], corners[:, 1]


def _hull_steps(choices: list[Choice]) -> list[tuple[int, int]]:
    """Return the steps (error, saving) along the upper hull of one head's choices; each is less efficient."""
    hull: list[Choice] = []
    for choice in choices:
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            rises = (b.saving - a.saving) * (choice.error - b.error) <= (choice.saving - b.saving) * (b.error - a.error)
            if not rises:
                break
            hull.pop()
        hull.append(choice)
    return [(b.error - a.error, b.saving - a.saving) for a, b in pairwise(hull)]


def _bound(
    left: Integers, saving: Integers, reached: Integers, rest_errors: Integers, rest_savings: Integers
) -> NDArray[np.float64]:
    """Return the most saving that the linear relaxation allows, a little rounded up."""
    following = np.minimum(reached + 1, len(rest_errors) - 1)
    width = np.maximum(rest_errors[following] - rest_errors[reached], 1).astype(float)
    share = np.clip((left - rest_errors[reached]) / width, 0.0, 1.0)
    best = saving + rest_savings[reached] + share * (rest_savings[following] - rest_savings[reached])
    result: NDArray[np.float64] = best * (1 + 1e-12) + 1
    return result
