"""The members of the workspace, read from its folders: nothing has to be registered twice."""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: The uv that started this program, which need not be on the path.
UV = os.environ.get("UV", "uv")

#: Distribution names that belong to other people's projects on the public index.
TAKEN_NAMES = ("dato", "dd", "deme", "cskv")


@dataclass(frozen=True)
class Member:
    """One distribution of the workspace: a package, a shared room or the kernels."""

    name: str
    version: str
    description: str
    path: Path
    module: str
    #: Other members that the distribution requires, without its extras.
    requires: tuple[str, ...]
    #: Other members that its extra `demo` requires.
    demo_requires: tuple[str, ...]
    #: Name of the method it registers in the entry-point group `pared.methods`, if any.
    method: str | None
    #: Names of its extras.
    extras: tuple[str, ...] = ()

    @property
    def is_package(self) -> bool:
        """Whether it brings a method (packages/), as opposed to a shared room."""
        return self.path.parent.name == "packages"

    @property
    def source(self) -> Path:
        """Folder of the import package."""
        return self.path / "src" / self.module

    @property
    def tests(self) -> Path:
        """Folder of its tests, which may not exist yet."""
        return self.path / "tests"


def normalised(name: str) -> str:
    """Return a distribution name in the form that package indexes compare."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    """Return the distribution name at the start of a requirement such as `dato[demo]>=0.1`."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    if match is None:
        raise ValueError(f"{requirement!r} does not start with a distribution name")
    return normalised(match.group())


def members(root: Path = ROOT) -> list[Member]:
    """Return every member below `root`: shared rooms, kernels, then packages by name."""
    folders = [*sorted((root / "shared").glob("*")), root / "kernels", *sorted((root / "packages").glob("*"))]
    projects = {}
    for folder in folders:
        if (folder / "pyproject.toml").is_file():
            projects[folder] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {normalised(project["name"]) for project in projects.values()}

    def inside(requirements: list[str]) -> tuple[str, ...]:
        return tuple(name for name in map(requirement_name, requirements) if name in names)

    found = []
    for folder, project in projects.items():
        name = normalised(project["name"])
        methods = project.get("entry-points", {}).get("pared.methods", {})
        found.append(
            Member(
                name=name,
                version=project["version"],
                description=project["description"],
                path=folder,
                module=name.replace("-", "_"),
                requires=inside(project.get("dependencies", [])),
                demo_requires=inside(project.get("optional-dependencies", {}).get("demo", [])),
                extras=tuple(project.get("optional-dependencies", {})),
                method=next(iter(methods), None),
            )
        )
    return found


def member(name: str, root: Path = ROOT) -> Member:
    """Return the member called `name`; `LookupError` lists the valid names."""
    by_name = {one.name: one for one in members(root)}
    if normalised(name) not in by_name:
        raise LookupError(f"no member is called {name!r}; the workspace has {', '.join(by_name)}")
    return by_name[normalised(name)]


def closure(one: Member, root: Path = ROOT, *, demo: bool = False) -> list[Member]:
    """Return `one` and every member it needs, in no order; `demo` adds what its extra `demo` needs."""
    by_name = {other.name: other for other in members(root)}
    wanted = [*one.requires, *(one.demo_requires if demo else ())]
    found = {one.name: one}
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = by_name[name]
            wanted.extend(by_name[name].requires)
    return list(found.values())


if __name__ == "__main__":
    print(json.dumps([one.name for one in members()]))
