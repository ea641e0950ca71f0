"""Measuring, quality metrics, result store, reports and the pared command."""

from __future__ import annotations

from pared_bench.contexts import BenchContext, DemoContext
from pared_bench.errors import BenchError
from pared_bench.results import DemoResult, Figure, Record, Table

__version__ = "0.1.0"

__all__ = ["BenchContext", "BenchError", "DemoContext", "DemoResult", "Figure", "Record", "Table", "__version__"]
