"""Where the files of an optional wheel lie."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

EXTRA = "pip install 'pared-zoo[real]'"


def wheel_file(module: str, *parts: str) -> Path:
    """Path of a file inside an installed package, which is not imported.

    Raises:
        ModuleNotFoundError: if the package is absent; the message has the line to type.
        FileNotFoundError: if the package is there without the file.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{module} is not installed: {EXTRA}", name=module)
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the installed {module}; reinstall it: {EXTRA}")
    return path
