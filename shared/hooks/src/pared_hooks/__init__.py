"""Reversible patching, model views and the denoising clock shared by the pared packages."""

from pared_hooks.clock import StepClock, StepState
from pared_hooks.config import Config
from pared_hooks.errors import AlreadyAppliedError, ConfigError, ConflictError, ParedError, UnsupportedModelError
from pared_hooks.handle import Handle
from pared_hooks.patch import Patch
from pared_hooks.rateplan import RatePlan
from pared_hooks.views import (
    AttentionSite,
    DecoderFamily,
    DecoderLayer,
    DecoderView,
    DenoiserBlock,
    DenoiserView,
    Grid,
    TokenSpans,
    register_decoder_family,
    register_denoiser_family,
)

__version__ = "0.1.0"

__all__ = [
    "AlreadyAppliedError",
    "AttentionSite",
    "Config",
    "ConfigError",
    "ConflictError",
    "DecoderFamily",
    "DecoderLayer",
    "DecoderView",
    "DenoiserBlock",
    "DenoiserView",
    "Grid",
    "Handle",
    "ParedError",
    "Patch",
    "RatePlan",
    "StepClock",
    "StepState",
    "TokenSpans",
    "UnsupportedModelError",
    "register_decoder_family",
    "register_denoiser_family",
]
