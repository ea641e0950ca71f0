"""Dynamics-aware token pruning and feature caching for diffusion UNets and DiTs (DaTo)."""

from dato.config import DaToConfig
from dato.functional import FULL
from dato.policy import Policy, PolicyError, preset_names

__version__ = "0.1.0"

__all__ = [
    "FULL",
    "DaToConfig",
    "Policy",
    "PolicyError",
    "preset_names",
]
