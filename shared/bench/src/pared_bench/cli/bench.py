"""`pared bench`: measure one method and keep the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pared_bench import registry
from pared_bench.cli.demo import DeviceOption, SeedOption, quiet_libraries, shown_progress
from pared_bench.cli.listing import complete_method
from pared_bench.errors import UsageError
from pared_bench.options import split_tokens


def bench(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help="The method to measure. Further options go to the bench itself.",
            autocompletion=complete_method,
            show_default=False,
        ),
    ],
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    full: Annotated[bool, typer.Option("--full", help="Full-size configurations: more memory, more minutes.")] = False,
    results: Annotated[
        Path | None, typer.Option(help="Folder of the result files.", show_default="benchmarks/results")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the bench's own files.")] = Path("pared-report"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON on standard output.")] = False,
) -> None:
    """Measure a method and keep the numbers.

    They are merged into benchmarks/results/DEVICE/NAME.json.
    """
    chosen, tokens = split_tokens(names)
    if len(chosen) != 1:
        raise UsageError(f"pared bench measures one method at a time, got {' '.join(chosen) or 'none'}")
    method = registry.find(chosen[0])

    from pared_bench import report, runner
    from pared_bench.contexts import BenchContext
    from pared_bench.environment import Environment, resolve_device
    from pared_bench.files import own_folder, writable_folder
    from pared_bench.store import ResultStore, StoredRecord

    quiet_libraries()
    target = resolve_device(device)
    options = runner.bench_options(method, tokens)
    store = ResultStore(results)
    # tried before the long work, and so is the file that the numbers are merged into
    writable_folder(store.root)
    environment = Environment.here(target, seed=seed, packages=(method.distribution,) if method.distribution else ())
    store.load(method.name, environment.slug)
    with own_folder(out) as place, shown_progress() as progress:
        context = BenchContext(target, seed=seed, full=full, out=place, progress=progress)
        records = runner.run_bench(method, context, options)
    path = store.add(method.name, records, environment)
    stored = [StoredRecord(method.name, record, environment) for record in records]
    if as_json:
        typer.echo(json.dumps({"file": str(path), "records": [entry.to_dict() for entry in stored]}, indent=1))
    else:
        report.print_results(stored)
        typer.echo(f"Results: {path}")
