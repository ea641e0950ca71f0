"""`pared new`: a package from the template."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pared_bench import registry


def new(
    name: Annotated[str, typer.Argument(help="Name of the package, such as my-method.")],
    root: Annotated[Path | None, typer.Option(help="The workspace.", show_default="this checkout")] = None,
) -> None:
    """Create a package in the workspace from the template.

    It passes lint, types and tests as it stands.
    """
    from pared_bench.new import create

    folder = create(name, root or registry.workspace_root() or Path.cwd())
    typer.echo(f"Created {folder}. Next: uv lock, then uv run nox -s tests-{folder.name}")
