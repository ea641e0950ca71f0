"""Reversible patching, model views and the denoising clock shared by the pared packages."""

from pared_hooks.clock import StepClock, StepState
from pared_hooks.config import Config
from pared_hooks.errors import AlreadyAppliedError, ConfigError, ConflictError, ParedError, UnsupportedModelError
from pared_hooks.handle import Handle
from pared_hooks.patch import Patch

__version__ = "0.1.0"

__all__ = [
    "AlreadyAppliedError",
    "Config",
    "ConfigError",
    "ConflictError",
    "Handle",
    "ParedError",
    "Patch",
    "StepClock",
    "StepState",
    "UnsupportedModelError",
]
