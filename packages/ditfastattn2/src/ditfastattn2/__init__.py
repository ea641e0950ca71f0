"""Head-wise attention compression for multimodal diffusion transformers (DiTFastAttnV2)."""

from __future__ import annotations

# `ditfastattn2.apply` and `ditfastattn2.calibrate` are functions: these imports rebind the names of the submodules.
from ditfastattn2.apply import DiTFastAttnV2Handle, applied, apply
from ditfastattn2.calibrate import calibrate
from ditfastattn2.config import DiTFastAttnV2Config
from ditfastattn2.errors import CalibrationError, GradientError, PlanMismatch
from ditfastattn2.plan import LayerPlan, Plan

Config = DiTFastAttnV2Config

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "Config",
    "DiTFastAttnV2Config",
    "DiTFastAttnV2Handle",
    "GradientError",
    "LayerPlan",
    "Plan",
    "PlanMismatch",
    "applied",
    "apply",
    "calibrate",
]
