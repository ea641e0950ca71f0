"""The tree of commands. A command imports what it needs when it runs, so that help stays quick."""

from __future__ import annotations

from typing import Annotated

import typer

from pared_bench.cli import bench, demo, kernels, listing, results, workspace, zoo
from pared_bench.cli.root import RootGroup

app = typer.Typer(
    name="pared",
    cls=RootGroup,
    no_args_is_help=True,
    # importing rich's Markdown renderer would take longer than all the rest of the help
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Efficiency methods for generative vision and language models: see them, measure them, use them.",
)


@app.command("list")
def _list(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Show the installed methods and what each offers."""
    listing.list_methods(as_json=as_json)


app.command("demo", context_settings=demo.PASS_ON)(demo.demo)
app.command("bench", context_settings=demo.PASS_ON)(bench.bench)
app.command("report")(results.report)
app.command("merge")(results.merge)
app.command("doctor")(results.doctor)
app.command("new")(workspace.new)
app.add_typer(zoo.app, name="zoo")
app.add_typer(kernels.app, name="kernels")


def _show_version(wanted: bool) -> None:
    if wanted:
        from pared_bench import __version__

        typer.echo(f"pared {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass
