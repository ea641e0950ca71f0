"""Reversible patching, model views and the denoising clock shared by the pared packages."""

__version__ = "0.1.0"
