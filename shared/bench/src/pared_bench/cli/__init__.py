"""The `pared` command. Nothing heavy is imported here: a subcommand imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pared_bench.cli import bench, demo, kernels, listing, results, workspace, zoo
from pared_bench.cli.root import RootGroup
from pared_bench.errors import BenchError

app = typer.Typer(
    name="pared",
    cls=RootGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Efficiency methods for generative vision and language models: see them, measure them, use them.",
)
app.command("list")(listing.list_methods)
app.command("demo", context_settings=demo.PASS_ON)(demo.demo)
app.command("bench", context_settings=demo.PASS_ON)(bench.bench)
app.command("report")(results.report)
app.command("merge")(results.merge)
app.command("doctor")(results.doctor)
app.add_typer(zoo.app, name="zoo")
app.add_typer(kernels.app, name="kernels")
app.command("new")(workspace.new)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; errors become one message on standard error."""
    command = typer.main.get_command(app)
    try:
        command.main(args=None if arguments is None else list(arguments), prog_name="pared")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from pared_bench.runner import explain

        typer.echo(f"pared: {explain(error)}", err=True)
        sys.exit(error.exit_code if isinstance(error, BenchError) else 1)
