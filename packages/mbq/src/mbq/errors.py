"""Errors of mbq, each also of the built-in class that fits it."""

from __future__ import annotations

from pared_hooks import AlreadyAppliedError, ParedError, UnsupportedModelError


class CalibrationError(ParedError, ValueError):
    """The calibration data cannot be used, or the model did not stay finite on it."""


class UnsupportedLayerError(UnsupportedModelError, NotImplementedError):
    """A decoder layer, or the state a model is in, is not known to mbq."""


class AlreadyQuantizedError(AlreadyAppliedError, RuntimeError):
    """The model's linear layers are quantised already."""


class ResultMismatchError(ParedError, ValueError):
    """A calibration result belongs to another architecture or another configuration."""


class RestoreUnavailableError(ParedError, RuntimeError):
    """The original weights were given up with `restore="none"`."""


class FoldError(ParedError, RuntimeError):
    """Folding the scales of a layer changed what it computes in full precision."""
