"""`pared demo`: run demos and write one page."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from pared_bench import registry
from pared_bench.cli.listing import complete_method
from pared_bench.errors import BenchError
from pared_bench.options import split_tokens
from pared_bench.progress import PlainProgress, Progress

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.", min=0)]


def demo(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Methods to show; none: every installed one. Further options go to the demo itself, "
            'such as --prompt "a red circle".',
            autocompletion=complete_method,
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and the demos' files.")] = Path("pared-report"),
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    full: Annotated[bool, typer.Option("--full", help="Larger runs: better numbers, more minutes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON on standard output.")] = False,
) -> None:
    """Show methods at work: pictures and numbers, in one page."""
    chosen, tokens = split_tokens(names or [])
    selected = registry.select(chosen, "demo")
    if not selected:
        raise BenchError("no installed method has a demo. Each method is a package: pip install one, then try again.")

    from pared_bench import html, report, runner
    from pared_bench.contexts import DemoContext
    from pared_bench.environment import Environment, resolve_device
    from pared_bench.files import own_folder, writable_folder

    quiet_libraries()
    target = resolve_device(device)
    options = {}
    for method in selected:
        try:
            options[method.name] = runner.demo_options(method, tokens)
        except Exception:
            # with names given, a demo that cannot start is the answer; otherwise it becomes a line of the report
            if chosen or tokens:
                raise
            options[method.name] = {}
    folder = writable_folder(out)
    outcomes = []
    with shown_progress() as progress:
        overall = progress.begin("demos", len(selected)) if len(selected) > 1 else None
        for method in selected:
            with own_folder(folder / method.name) as place:
                context = DemoContext(target, seed=seed, full=full, out=place, progress=progress)
                outcomes.append(runner.run_demo(method, context, options[method.name]))
            if overall is not None:
                progress.advance(overall)
    distributions = tuple(m.distribution for m in selected if m.distribution)
    environment = Environment.here(target, seed=seed, packages=distributions)
    page = html.write_demo_page(folder / "index.html", outcomes, environment)
    if as_json:
        typer.echo(json.dumps(report.demo_json(outcomes, environment, page), indent=1))
    else:
        report.print_demos(outcomes, page)
    if failed := [outcome for outcome in outcomes if outcome.error]:
        for outcome in failed:
            typer.echo(f"pared: {outcome.method.name}: {outcome.error}", err=True)
        raise typer.Exit(1)


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """Bars in a terminal, plain lines elsewhere (a CI log, a pipe); what a method prints meanwhile goes there too.

    Standard output is for the answer: with `--json` it must be nothing but JSON.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if not sys.stderr.isatty():
            yield PlainProgress(sys.stderr)
            return
        from pared_bench.progress import RichProgress

        with RichProgress() as bars:
            yield bars


def quiet_libraries() -> None:
    """Keep what libraries remark to their developers out of the answer, unless the user has asked for it."""
    if os.environ.get("PARED_DEBUG"):
        return
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
