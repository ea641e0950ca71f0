"""The error of sjd that has no place among those of all packages."""

from __future__ import annotations

from pared_hooks import ParedError


class GrammarError(ParedError, ValueError):
    """A grid, or the lack of one, does not fit what was asked of it."""
