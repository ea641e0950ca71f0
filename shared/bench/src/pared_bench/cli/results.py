"""`pared report` and `pared doctor`: what was measured, and what this machine can run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pared_bench.errors import BenchError, UsageError, did_you_mean

if TYPE_CHECKING:
    from pared_bench.doctor import Finding


def report(
    packages: Annotated[
        list[str] | None, typer.Argument(help="Packages to report; none: all that have results.", show_default=False)
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of the result files.", show_default="benchmarks/results")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Only this device's folder, such as nvidia-h200.")] = None,
    style: Annotated[
        Literal["terminal", "markdown", "html", "json"], typer.Option("--format", help="What to write.")
    ] = "terminal",
    out: Annotated[Path | None, typer.Option(help="File to write; else standard output.", show_default=False)] = None,
) -> None:
    """Show the stored results: tables, Markdown, HTML or JSON."""
    from pared_bench import files, html
    from pared_bench import report as writer
    from pared_bench.store import ResultStore

    store = ResultStore(results)
    known, devices = store.packages(), store.devices()
    for name in packages or []:
        if name not in known:
            hint = did_you_mean(name, known)
            raise BenchError(f"no results of {name!r} under {store.root}.{hint} Measure it with: pared bench {name}")
    if device is not None and device not in devices:
        hint = did_you_mean(device, devices)
        raise BenchError(f"no results on {device!r} under {store.root}.{hint} Devices: {', '.join(devices) or 'none'}.")
    stored = [entry for name in packages or known for entry in store.load(name, device)]
    if style == "html":
        typer.echo(f"Report: {html.write_results_page(out or Path('pared-report/results.html'), stored).resolve()}")
    elif style in ("markdown", "json"):
        text = writer.markdown(stored) if style == "markdown" else writer.results_json(stored)
        if out is None:
            typer.echo(text, nl=False)
        else:
            files.atomic_write(out, text)
    elif out is not None:
        raise UsageError("--out needs --format markdown, html or json")
    elif stored:
        writer.print_results(stored)
    else:
        typer.echo(f"Nothing has been measured yet under {store.root}. Start with: pared bench NAME")


def merge(
    folder: Annotated[
        Path, typer.Argument(help="Folder with DEVICE/PACKAGE.json files.", exists=True, file_okay=False)
    ],
    results: Annotated[
        Path | None, typer.Option(help="Folder to merge into.", show_default="benchmarks/results")
    ] = None,
) -> None:
    """Take over result files that were measured on another machine."""
    from pared_bench.store import ResultStore

    changed = ResultStore(results).merge(ResultStore(folder))
    if not changed:
        raise BenchError(f"{folder} holds no result files (DEVICE/PACKAGE.json)")
    for path in changed:
        typer.echo(str(path))


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this machine can run. Ends with exit code 1 when something needed is missing or too old."""
    from dataclasses import asdict

    from pared_bench.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print_findings(findings)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def _print_findings(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    looks = {"good": ("✓", "green"), "note": ("–", "yellow"), "bad": ("✗", "bold red")}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        mark, style = looks[finding.state]
        table.add_row(Text(mark, style=style), Text(finding.topic), Text(finding.text))
    Console().print(table)
