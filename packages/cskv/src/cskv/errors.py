"""Errors of cskv that a caller may also catch as the built-in class that fits them."""

from __future__ import annotations

from pared_hooks import AlreadyAppliedError, UnsupportedModelError


class UnsupportedAttentionError(UnsupportedModelError, NotImplementedError):
    """The model, or the way its attention is computed, is not known to cskv."""


class AppliedTwiceError(AlreadyAppliedError, RuntimeError):
    """cskv is on the model already."""
