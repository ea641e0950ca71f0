"""Install one member alone, from wheels, in a clean environment outside the workspace, and use it there.

Two steps: without extras and with triton removed, it must import; with its extra `demo`, its demo must run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from workspace import ROOT, UV, Member, closure, member

IMPORT_CHECK = """
import importlib, importlib.util, pathlib, sys
name, root = sys.argv[1:]
assert importlib.util.find_spec("triton") is None, "triton is still importable"
module = importlib.import_module(name)
missing = [public for public in getattr(module, "__all__", ()) if not hasattr(module, public)]
assert not missing, f"{name}.__all__ names what {name} does not have: {missing}"
assert module.__version__
where = pathlib.Path(module.__file__).resolve()
assert not where.is_relative_to(root), f"{name} was imported from the workspace: {where}"
print(f"{name} {module.__version__} imports from {where.parent}")
"""


def run(*command: str | Path, cwd: Path, env: dict[str, str]) -> None:
    """Run a command, showing it; a failure ends the program with its status."""
    print("$", *(str(part).strip().splitlines()[0] for part in command), flush=True)
    status = subprocess.run([str(part) for part in command], cwd=cwd, env=env, check=False).returncode
    if status:
        raise SystemExit(status)


def clean_environment() -> dict[str, str]:
    """Return the environment without what would lead back into the workspace."""
    hidden = {"VIRTUAL_ENV", "PYTHONPATH", "UV_PROJECT", "UV_PROJECT_ENVIRONMENT", "UV_WORKING_DIRECTORY"}
    return {name: value for name, value in os.environ.items() if name not in hidden}


def check(one: Member, folder: Path, *, demo: bool) -> None:
    """Build, install and use `one` below `folder`."""
    env = clean_environment()
    wheels, python = folder / "wheels", folder / "venv" / "bin" / "python"
    constraints = folder / "constraints.txt"
    for needed in closure(one, demo=True):
        run(UV, "build", "--quiet", "--wheel", "--package", needed.name, "--out-dir", wheels, cwd=ROOT, env=env)
    export = (
        UV,
        "export",
        "--quiet",
        "--frozen",
        "--all-packages",
        "--all-extras",
        "--no-hashes",
        "--no-emit-workspace",
    )
    run(*export, "--output-file", constraints, cwd=ROOT, env=env)
    # The workspace leaves out what only the users of some wheels' other parts need, such as a runtime that takes
    # minutes to compile; so does who follows the zoo's documentation.
    overrides = folder / "overrides.txt"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    overrides.write_text("\n".join(project["tool"]["uv"].get("override-dependencies", [])), encoding="utf-8")
    run(UV, "venv", "--quiet", "--python", sys.executable, folder / "venv", cwd=folder, env=env)

    def install(needed: list[Member], extra: str) -> None:
        files = []
        for other in needed:
            (wheel,) = wheels.glob(f"{other.module}-{other.version}-*.whl")
            files.append(f"{other.name}{extra if other is one else ''} @ {wheel.as_uri()}")
        command = (UV, "pip", "install", "--quiet", "--python", python)
        run(*command, "--constraints", constraints, "--overrides", overrides, *files, cwd=folder, env=env)

    install(closure(one), "")
    run(UV, "pip", "uninstall", "--quiet", "--python", python, "triton", cwd=folder, env=env)
    run(python, "-I", "-c", IMPORT_CHECK, one.module, ROOT, cwd=folder, env=env)
    if not (demo and one.method):
        return
    install([one, *(other for other in closure(one, demo=True) if other.name != one.name)], "[demo]")
    run(python.parent / "pared", "demo", one.method, "--out", folder / "report", cwd=folder, env=env)
    pages = [page for page in (folder / "report").rglob("*.html") if page.stat().st_size > 0]
    if not pages:
        raise SystemExit(f"the demo of {one.name} ended without a page in its report")
    print(f"{one.name}: the demo wrote {pages[0].name}")


def main() -> None:
    """Check the member named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a member of the workspace, such as dato or pared-hooks")
    parser.add_argument("--no-demo", action="store_true", help="stop after the import")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pared-isolated-") as folder:
        check(member(options.name), Path(folder).resolve(), demo=not options.no_demo)


if __name__ == "__main__":
    main()
