"""`pared list`: which methods are installed."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pared_bench import registry


def list_methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the installed methods and what each offers."""
    found = list(registry.methods().values())
    if as_json:
        rows = [{"name": m.name, "version": m.version, "offers": list(m.parts()), "summary": m.summary} for m in found]
        typer.echo(json.dumps(rows, indent=1))
        return
    if not found:
        typer.echo("No method is installed. Each is a package of its own, for example: pip install framefusion")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "version", "offers", "what it does"):
        table.add_column(column)
    for method in found:
        table.add_row(method.name, method.version, " ".join(method.parts()), method.summary)
    Console().print(table, highlight=False, markup=False)


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Return the method names that begin like `incomplete`, with their summaries, for shell completion."""
    return [(m.name, m.summary) for m in registry.methods().values() if m.name.startswith(incomplete)]
