"""Errors of ditfastattn2 beside those of pared_hooks."""

from __future__ import annotations

from collections.abc import Sequence

from pared_hooks import ParedError


class PlanMismatch(ParedError, ValueError):
    """A plan was made for another model or another kind of run; `differences` lists what differs."""

    def __init__(self, differences: Sequence[str], remedy: str = "calibrate one for this model") -> None:
        super().__init__(f"the plan does not fit: {'; '.join(differences)}. Remedy: {remedy}")
        self.differences = tuple(differences)


class CalibrationError(ParedError, RuntimeError):
    """The model gave outputs from which no plan can be made."""


class GradientError(ParedError, RuntimeError):
    """The model trains, or gradients are asked for; compressed attention has no backward pass."""
