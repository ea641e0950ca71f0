"""Measuring, quality metrics, result store, reports and the pared command."""

__version__ = "0.1.0"
