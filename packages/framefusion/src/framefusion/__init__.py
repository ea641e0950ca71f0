"""Merge similar video tokens, then prune unimportant ones, inside the LLM of a vision-language model (FrameFusion)."""

from __future__ import annotations

from framefusion.config import FrameFusionConfig
from framefusion.errors import BudgetError, LayoutError, StaleCacheError, UnsupportedCacheError, UnsupportedLayerError

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "FrameFusionConfig",
    "LayoutError",
    "StaleCacheError",
    "UnsupportedCacheError",
    "UnsupportedLayerError",
]
