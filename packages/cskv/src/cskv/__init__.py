"""Low-rank KV cache with an exact window for transformers language models (CSKV, arXiv 2409.10593)."""

from __future__ import annotations

# `cskv.apply`, `cskv.calibrate`, `cskv.finetune` and `cskv.fit` are functions: these imports rebind the names
# that importing the submodules binds.
from cskv.apply import CSKVHandle, applied, apply
from cskv.cache import CSKVCache, CSKVLayer
from cskv.calibrate import Statistics, calibrate
from cskv.config import CSKVConfig
from cskv.errors import AppliedTwiceError, UnsupportedAttentionError
from cskv.factors import Factors, LayerFactors, load, load_official, save
from cskv.finetune import finetune
from cskv.fit import RankPlan, allocate_ranks, fit

__version__ = "0.1.0"

__all__ = [
    "AppliedTwiceError",
    "CSKVCache",
    "CSKVConfig",
    "CSKVHandle",
    "CSKVLayer",
    "Factors",
    "LayerFactors",
    "RankPlan",
    "Statistics",
    "UnsupportedAttentionError",
    "allocate_ranks",
    "applied",
    "apply",
    "calibrate",
    "finetune",
    "fit",
    "load",
    "load_official",
    "save",
]
