"""Which methods are installed, found without importing any of them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from pared_bench.errors import BenchError, MissingExtraError, MissingPartError, UnknownMethodError

GROUP = "pared.methods"
PARTS = ("demo", "bench", "cli")

# On PyPI these names belong to other projects, so a pip line must never name them.
FOREIGN_ON_PYPI = frozenset({"dato", "dd", "deme", "cskv"})


@dataclass(frozen=True)
class Method:
    """An installed method; `distribution` is empty for one that lies in a folder without being installed."""

    name: str
    module: str
    distribution: str = ""
    version: str = ""
    summary: str = ""

    def parts(self) -> tuple[str, ...]:
        """Return which of demo, bench and cli the package has, by looking at its files."""
        try:
            spec = importlib.util.find_spec(self.module)
        except (ImportError, ValueError):
            return ()
        folders = [] if spec is None else list(spec.submodule_search_locations or ())
        return tuple(
            part
            for part in PARTS
            if any(Path(f, f"{part}.py").is_file() or Path(f, part, "__init__.py").is_file() for f in folders)
        )

    def load(self, part: str) -> ModuleType:
        """Import `<module>.<part>`.

        Raises MissingPartError when the package has no such module, MissingExtraError (with the pip line to type) when
        something that module imports is not installed.
        """
        target = f"{self.module}.{part}"
        try:
            return importlib.import_module(target)
        except ModuleNotFoundError as error:
            if error.name == target:
                offers = ", ".join(self.parts()) or "none of demo, bench, cli"
                raise MissingPartError(f"{self.name} has no {part}; it offers {offers}") from None
            raise self.missing(error, part) from error

    def missing(self, error: ModuleNotFoundError, part: str) -> BenchError:
        """Turn a failed import inside this method's `part` into an error that says what to install."""
        name = (error.name or "").partition(".")[0]
        return MissingExtraError(
            f"{self.name}'s {part} needs {name!r}, which is not installed. Type: {install_line(self, name)}"
        )


def methods() -> dict[str, Method]:
    """Return the installed methods by name, sorted; reads distribution metadata only.

    In a workspace checkout that is on the path without being installed, the packages in its `packages` folder count.
    """
    found = {}
    for entry in metadata.entry_points(group=GROUP):
        dist = entry.dist
        info = dist.metadata if dist is not None else None
        found[entry.name] = Method(
            entry.name,
            entry.value.partition(":")[0],
            distribution=dist.name if dist is not None else "",
            version=dist.version if dist is not None else "",
            summary=(info["Summary"] or "") if info is not None else "",
        )
    if not found and (root := workspace_root()) is not None:
        found = {method.name: method for method in folder_methods(root)}
    return dict(sorted(found.items()))


def find(name: str) -> Method:
    """Return the method of that name; raises UnknownMethodError that suggests the nearest."""
    known = methods()
    if name in known:
        return known[name]
    underscored = {key.replace("-", "_"): key for key in known}
    if name.replace("-", "_") in underscored:
        return known[underscored[name.replace("-", "_")]]
    raise UnknownMethodError(name, known)


def select(names: Iterable[str], part: str) -> list[Method]:
    """Return the named methods; with no name, every installed method that has `part`."""
    chosen = [find(name) for name in dict.fromkeys(names)]
    return chosen or [method for method in methods().values() if part in method.parts()]


def workspace_root() -> Path | None:
    """Return the checkout this file lies in, or None when it was installed from a wheel."""
    here = Path(__file__).resolve()
    root = here.parents[4] if len(here.parents) > 4 else None
    if root is not None and here == root / "shared" / "bench" / "src" / "pared_bench" / here.name:
        return root
    return None


def folder_methods(root: Path) -> list[Method]:
    """Read the methods out of `packages/*/pyproject.toml` and put their `src` folders on the import path."""
    found = []
    for file in sorted(root.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        for name, value in project.get("entry-points", {}).get(GROUP, {}).items():
            found.append(
                Method(
                    name, value.partition(":")[0], version=project["version"], summary=project.get("description", "")
                )
            )
        source = str(file.parent / "src")
        if source not in sys.path:
            sys.path.append(source)
    return found


def install_line(method: Method, missing: str) -> str:
    """Return the pip command that brings the importable name `missing` for `method`."""
    wanted = missing.replace("_", "-").lower()
    extras = _extras(method.distribution)
    holding = [extra for extra, names in extras.items() if wanted in names]
    extra = holding[0] if holding else "demo" if "demo" in extras else None
    if extra is None:
        return f"pip install {wanted}"
    if method.distribution in FOREIGN_ON_PYPI:
        return "pip install " + " ".join(extras[extra] if wanted in extras[extra] else [wanted, *extras[extra]])
    return f"pip install '{method.distribution}[{extra}]'"


def absent_requirements(method: Method) -> list[str]:
    """Return the distributions that the method's demo extra names and that are not installed."""
    absent = []
    for name in _extras(method.distribution).get("demo", []):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            absent.append(name)
    return absent


def _extras(distribution: str) -> dict[str, list[str]]:
    """Return the distribution names behind each extra, read from the installed metadata."""
    try:
        lines = metadata.requires(distribution) or [] if distribution else []
    except metadata.PackageNotFoundError:
        return {}
    extras: dict[str, list[str]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        if "extra" not in marker:
            continue
        extra = marker.split("extra", 1)[1].lstrip(" =").strip().strip("\"')")
        name = requirement.strip()
        for stop in " <>=!~[(":
            name = name.partition(stop)[0]
        extras.setdefault(extra, []).append(name.lower())
    return extras
