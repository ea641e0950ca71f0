"""Reports in the terminal, as Markdown for the documentation, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared_bench.results import Table
from pared_bench.tables import Section, cell, is_number, sections

if TYPE_CHECKING:
    from rich.console import Console

    from pared_bench.environment import Environment
    from pared_bench.runner import DemoOutcome
    from pared_bench.store import StoredRecord


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table to the terminal, numbers flush right."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = console or Console()
    # a title of the table itself would be wrapped to the table's width
    console.print(Text(table.title, style="bold"))
    grid = RichTable(box=None, pad_edge=False)
    for index, name in enumerate(table.columns):
        right = all(is_number(row[index]) for row in table.rows)
        grid.add_column(Text(name), justify="right" if right else "left", header_style="dim")
    for row in table.rows:
        grid.add_row(*(Text(cell(value)) for value in row))
    console.print(grid)
    if table.note:
        console.print(Text(table.note, style="dim"))
    console.print()


def print_demos(outcomes: Sequence[DemoOutcome], page: Path) -> None:
    """Print each finished demo's summary, tables and headline numbers, and where the page with the pictures is."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for outcome in outcomes:
        if outcome.result is None:
            continue
        console.print(Text(f"{outcome.method.name}: {outcome.result.title}", style="bold"))
        console.print(Text(outcome.result.summary))
        console.print()
        for table in outcome.result.tables:
            print_table(table, console)
        if outcome.result.metrics:
            rows = [[name, value] for name, value in outcome.result.metrics.items()]
            print_table(Table("In short", ["number", "value"], rows, f"{outcome.seconds:.0f} s"), console)
    console.print(Text(f"Report: {page.resolve()}"))


def demo_json(outcomes: Iterable[DemoOutcome], environment: Environment, page: Path) -> dict[str, Any]:
    """Return what the demos showed as JSON values, pictures by title only."""
    return {
        "schema": "pared.demo/1",
        "environment": environment.to_dict(),
        "report": str(page.resolve()),
        "demos": [_outcome_json(outcome) for outcome in outcomes],
    }


def _outcome_json(outcome: DemoOutcome) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": outcome.method.name,
        "seconds": round(outcome.seconds, 3),
        "options": {name: str(value) for name, value in outcome.options.items()},
        "error": outcome.error or None,
    }
    if outcome.result is not None:
        result = outcome.result
        data |= {
            "title": result.title,
            "summary": result.summary,
            "metrics": {name: _json_cell(float(value)) for name, value in result.metrics.items()},
            "tables": [
                {
                    "title": table.title,
                    "columns": list(table.columns),
                    "rows": [[_json_cell(value) for value in row] for row in table.rows],
                    "note": table.note,
                }
                for table in result.tables
            ],
            "figures": [{"title": figure.title, "caption": figure.caption} for figure in result.figures],
        }
    return data


def _json_cell(value: Any) -> Any:
    """Return a cell as a JSON value: numbers of any library as numbers, what is not finite as None."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def print_results(stored: Iterable[StoredRecord]) -> None:
    """Print stored records to the terminal, one table per experiment and device."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for section in sections(stored):
        print_table(section.table, console)
        console.print(Text(_measured_on(section.environment), style="dim"))
        console.print()


def results_json(stored: Iterable[StoredRecord]) -> str:
    """Return stored records as a JSON list, each with its package and the environment it was measured in."""
    entries = [{"package": entry.package, **entry.to_dict()} for entry in stored]
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


def markdown_table(table: Table) -> str:
    """Return a table as Markdown, its note below in italics."""
    right = [all(is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]
    lines = [
        "| " + " | ".join(_escape(name) for name in table.columns) + " |",
        "| " + " | ".join("---:" if flush else "---" for flush in right) + " |",
        *("| " + " | ".join(_escape(cell(value)) for value in row) + " |" for row in table.rows),
    ]
    if table.note:
        lines += ["", f"*{_escape(table.note)}*"]
    return "\n".join(lines)


def markdown(stored: Iterable[StoredRecord], heading: int = 2) -> str:
    """Return stored records as Markdown for a documentation page: per device a heading, per experiment a table.

    `heading` is the level of the device headings (1-5). Without records the text says that nothing was measured yet.
    """
    by_device: dict[str, list[Section]] = {}
    for section in sections(stored):
        by_device.setdefault(section.environment.device, []).append(section)
    if not by_device:
        return "Nothing has been measured yet.\n"
    lines: list[str] = []
    for device, group in sorted(by_device.items()):
        lines += [f"{'#' * heading} {device}", ""]
        for section in group:
            lines += [f"{'#' * (heading + 1)} {section.table.title}", "", markdown_table(section.table), ""]
            lines += [_measured_on(section.environment, device=False), ""]
    return "\n".join(lines)


def _measured_on(environment: Environment, *, device: bool = True) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    parts = [environment.device if device else "", environment.date[:10], versions]
    parts.append(f"commit {environment.commit}" if environment.commit else "")
    return "Measured: " + "; ".join(part for part in [*parts, f"seed {environment.seed}"] if part) + "."


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
