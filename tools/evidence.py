"""Tables of the measured numbers in benchmarks/results/, as Markdown."""

from __future__ import annotations

from pathlib import Path


def markdown(results: Path, package: str | None = None) -> str:
    """placeholder"""
    return ""
