"""`pared kernels`: the shared operators."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pared_bench.cli.demo import DeviceOption, SeedOption
from pared_bench.errors import MissingExtraError, UsageError
from pared_bench.results import Table

app = typer.Typer(help="The shared operators: list, check, bench.", no_args_is_help=True, rich_markup_mode=None)

OpsArgument = Annotated[list[str] | None, typer.Argument(help="Operators; none: all.", show_default=False)]


@app.command("ls")
def list_operators() -> None:
    """List the operators, what each publishes and how it can run."""
    from pared_bench.report import print_table

    rows = [[info.name, " ".join(info.backends), " ".join(info.functions), info.summary] for info in _room().ls()]
    print_table(Table("Operators", ["operator", "backends", "functions", "what it does"], rows))


@app.command()
def check(
    ops: OpsArgument = None,
    backend: Annotated[str | None, typer.Option(help="reference, triton or cpu; none: each there is.")] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Compare the operators with their references in float64. Ends with exit code 1 when one differs."""
    _room()
    from pared_kernels import check as checker

    from pared_bench.environment import resolve_device
    from pared_bench.report import print_table

    with _bad_names():
        outcomes = checker.run(ops or None, backend, device=resolve_device(device), seed=seed)
    counts = Counter((outcome.operator, outcome.backend, outcome.status) for outcome in outcomes)
    pairs = dict.fromkeys((outcome.operator, outcome.backend) for outcome in outcomes)
    states = ("passed", "failed", "skipped")
    rows = [[*pair, *(counts[(*pair, state)] for state in states)] for pair in pairs]
    print_table(Table("Checks", ["operator", "backend", *states], rows))
    for outcome in outcomes:
        if outcome.status == "failed":
            typer.echo(f"{outcome.operator}, {outcome.backend}, {outcome.case}: {outcome.reason}", err=True)
    reasons = dict.fromkeys((o.operator, o.backend, o.reason) for o in outcomes if o.status == "skipped")
    for operator, name, reason in reasons:
        typer.echo(f"{operator}, {name} skipped: {reason}")
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def bench(
    ops: OpsArgument = None,
    device: DeviceOption = "auto",
    full: Annotated[bool, typer.Option("--full", help="Full-size cases also on the processor.")] = False,
    results: Annotated[
        Path | None, typer.Option(help="Folder of the result files.", show_default="benchmarks/results")
    ] = None,
) -> None:
    """Time the operators against plain torch, with the share of the roofline, and keep the numbers."""
    _room()
    from pared_kernels import bench as benches

    from pared_bench import report
    from pared_bench.environment import Environment, resolve_device
    from pared_bench.files import writable_folder
    from pared_bench.operators import PACKAGE, operator_records
    from pared_bench.store import ResultStore, StoredRecord

    target = resolve_device(device)
    store = ResultStore(results)
    writable_folder(store.root)
    environment = Environment.here(target)
    with _bad_names():
        records = operator_records(benches.run(ops or None, target, full=full or None))
    path = store.add(PACKAGE, records, environment)
    report.print_results(StoredRecord(PACKAGE, record, environment) for record in records)
    typer.echo(f"Results: {path}")


@contextlib.contextmanager
def _bad_names() -> Iterator[None]:
    """Turn the ValueError for an unknown operator, whose message lists the valid ones, into the command's own."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _room() -> Any:
    try:
        import pared_kernels
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"the kernels need {error.name!r}. Type: pip install pared-kernels") from error
    return pared_kernels
