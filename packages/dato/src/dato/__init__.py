"""Dynamics-aware token pruning and feature caching for diffusion UNets and DiTs (DaTo)."""

# `dato.apply` and `dato.search` are functions: these imports rebind the names that importing the submodules binds.
from dato.apply import DaToHandle, applied, apply
from dato.config import DaToConfig
from dato.costs import UnitCosts, unit_costs
from dato.fidelity import FidelityEvaluator
from dato.functional import FULL
from dato.policy import Policy, PolicyError, preset_names
from dato.profile import dynamics_profile
from dato.search import SearchResult, hypervolume, search

__version__ = "0.1.0"

__all__ = [
    "FULL",
    "DaToConfig",
    "DaToHandle",
    "FidelityEvaluator",
    "Policy",
    "PolicyError",
    "SearchResult",
    "UnitCosts",
    "applied",
    "apply",
    "dynamics_profile",
    "hypervolume",
    "preset_names",
    "search",
    "unit_costs",
]
