"""The exceptions of FrameFusion beside those of pared_hooks."""

from __future__ import annotations

from pared_hooks import ParedError, UnsupportedModelError


class BudgetError(ParedError, ValueError):
    """The asked cost cannot be met: the stages so far have already spent more than it allows."""


class LayoutError(ParedError, ValueError):
    """A token layout that does not describe the sequence it is given for."""


class StaleCacheError(ParedError, RuntimeError):
    """A cache with reduced layers that no longer belongs to an applied FrameFusion."""


class UnsupportedLayerError(UnsupportedModelError, NotImplementedError):
    """A decoder layer that the method cannot split into its attention and its MLP."""


class UnsupportedCacheError(ParedError, NotImplementedError):
    """A kind of cache whose layers cannot hold different numbers of tokens."""
