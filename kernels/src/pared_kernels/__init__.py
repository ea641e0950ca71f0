"""Triton kernels with plain references, CPU paths and one dispatch, shared by the pared packages."""

from __future__ import annotations

from typing import Any

from .dispatch import BackendUnavailableError, use
from .registry import OperatorInfo, ls, public_functions

__version__ = "0.1.0"

__all__ = ["BackendUnavailableError", "OperatorInfo", "__version__", "ls", "use"]


def __getattr__(name: str) -> Any:
    """Return the public function `name` of an operator folder; the folders are read at the first such access."""
    if not name.startswith("_"):
        functions = public_functions()
        if name in functions:
            globals()[name] = functions[name]
            return functions[name]
    raise AttributeError(f"module 'pared_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *public_functions()})
