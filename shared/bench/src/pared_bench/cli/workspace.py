"""`pared new`: a package from the template."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pared_bench import registry
from pared_bench.errors import BenchError


def new(
    name: Annotated[str, typer.Argument(help="Name of the package, such as my-method.")],
    root: Annotated[Path | None, typer.Option(help="The workspace.", show_default="this checkout")] = None,
) -> None:
    """Create a package in the workspace from the template.

    It passes lint, types and tests as it stands.
    """
    from pared_bench.new import create

    place = root or registry.workspace_root() or Path.cwd()
    if not (place / "pyproject.toml").is_file() or not (place / "packages").is_dir():
        raise BenchError(
            f"{place} is no workspace: it has no pyproject.toml and packages folder. Name one with --root DIR"
        )
    try:
        folder = create(name, place)
    except ValueError as error:
        raise BenchError(str(error)) from error
    typer.echo(f"Created {folder}. Next: uv sync, then uv run nox -s tests-{folder.name}")
