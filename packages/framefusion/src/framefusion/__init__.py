"""Merge similar video tokens, then prune unimportant ones, inside the LLM of a vision-language model (FrameFusion)."""

from __future__ import annotations

# `framefusion.apply` is a function: this import rebinds the name that importing the submodule binds.
from framefusion.apply import FrameFusionHandle, applied, apply
from framefusion.calibrate import calibrate
from framefusion.config import FrameFusionConfig
from framefusion.errors import BudgetError, LayoutError, StaleCacheError, UnsupportedCacheError, UnsupportedLayerError
from framefusion.layout import TokenLayout, VideoBlock
from framefusion.request import StageTrace

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "FrameFusionConfig",
    "FrameFusionHandle",
    "LayoutError",
    "StageTrace",
    "StaleCacheError",
    "TokenLayout",
    "UnsupportedCacheError",
    "UnsupportedLayerError",
    "VideoBlock",
    "applied",
    "apply",
    "calibrate",
]
