"""Turning stored records into tables a reader can compare in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from pared_bench.environment import Environment
from pared_bench.results import Record, Table
from pared_bench.store import StoredRecord

DASH = "–"


#: With more bars than this, a chart says less than its table.
MOST_BARS = 24


@dataclass(frozen=True)
class Bar:
    """One number of a chart, with its spread where it has one."""

    label: str
    value: float
    spread: tuple[float, float] | None


@dataclass(frozen=True)
class Chart:
    """One metric of a section, two bars or more."""

    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Section:
    """One experiment of one method on one device: a table of variants by metrics, and where it was measured.

    `charts` show the metrics that more than one row has. `environment` is that of the newest number; the table's note
    names the oldest where that was measured on another day or at another commit.
    """

    package: str
    table: Table
    environment: Environment
    charts: Sequence[Chart] = ()


def cell(value: Any) -> str:
    """Return a table cell's text: four significant digits for floats, thousands separated, a dash for None."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        whole = int(value)
        return f"{whole:,}" if abs(whole) >= 10000 else str(whole)
    if isinstance(value, Real):
        number = float(value)
        if number and not 1e-3 <= abs(number) < 1e15:
            return f"{number:.3g}"
        return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"
    if isinstance(value, (list, tuple)):
        return " × ".join(cell(item) for item in value)
    return str(value)


def is_number(value: Any) -> bool:
    """Return whether a cell is shown flush right."""
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def sections(stored: Iterable[StoredRecord]) -> list[Section]:
    """Group records by device, package, method and the setting "experiment", and pivot each group.

    Rows are variants under settings, columns the settings that vary and then the metrics; settings that are equal in
    the whole group go into the note, and so do the records' own notes.
    """
    groups: dict[tuple[str, str, str, str], list[StoredRecord]] = {}
    for entry in stored:
        experiment = str(entry.record.settings.get("experiment", ""))
        key = (entry.package, entry.environment.slug, entry.record.method, experiment)
        groups.setdefault(key, []).append(entry)
    return [_section(key[2], key[3], entries) for key, entries in groups.items()]


def _section(method: str, experiment: str, entries: list[StoredRecord]) -> Section:
    environments = sorted((entry.environment for entry in entries), key=lambda environment: environment.date)
    oldest, latest = environments[0], environments[-1]
    records = [entry.record for entry in entries]
    varying, fixed = _settings(records)
    metrics = list(dict.fromkeys((record.metric, record.unit) for record in records))
    rows: dict[str, dict[Any, Record]] = {}
    for record in records:
        values = [record.settings.get(name) for name in varying]
        row = rows.setdefault(json.dumps([record.variant, values]), {})
        row[(record.metric, record.unit)] = record
    cells = []
    for row in rows.values():
        first = next(iter(row.values()))
        cells.append(
            [first.variant, *(first.settings.get(name) for name in varying), *(_measured(row.get(m)) for m in metrics)]
        )
    columns = ["variant", *varying, *(f"{name} [{unit}]" if unit else name for name, unit in metrics)]
    title = f"{method}: {experiment}" if experiment else method
    note = "; ".join(f"{name} {cell(value)}" for name, value in fixed.items())
    remarks = list(dict.fromkeys(f"{r.variant}, {r.metric}: {r.note}" for r in records if r.note))
    if (oldest.date[:10], oldest.commit) != (latest.date[:10], latest.commit):
        remarks.append(f"Oldest number: {oldest.date[:10]}, commit {oldest.commit or 'unknown'}")
    note = ". ".join(part for part in [note, *remarks] if part)
    return Section(entries[0].package, Table(title, columns, cells, note), latest, _charts(rows, varying, metrics))


def _charts(
    rows: Mapping[str, Mapping[Any, Record]], varying: Sequence[str], metrics: Sequence[tuple[str, str]]
) -> list[Chart]:
    charts = []
    for metric, unit in metrics:
        found = [row[(metric, unit)] for row in rows.values() if (metric, unit) in row]
        bars = [
            Bar(", ".join([record.variant, *_varied(record, varying)]), record.value, record.spread)
            for record in found
            if record.value is not None
        ]
        if 2 <= len(bars) <= MOST_BARS:
            charts.append(Chart(f"{metric} [{unit}]" if unit else metric, bars))
    return charts


def _varied(record: Record, varying: Sequence[str]) -> list[str]:
    return [f"{name} {cell(record.settings[name])}" for name in varying if name in record.settings]


def _settings(records: Sequence[Record]) -> tuple[list[str], dict[str, Any]]:
    """Split the settings' names into those that vary over the records and those that are the same in all."""
    names = list(dict.fromkeys(name for record in records for name in record.settings if name != "experiment"))
    varying, fixed = [], {}
    for name in names:
        values = {json.dumps(record.settings.get(name)) for record in records}
        if len(values) > 1:
            varying.append(name)
        else:
            fixed[name] = records[0].settings[name]
    return varying, fixed


def _measured(record: Record | None) -> Any:
    """Return the number of a record, as text with its spread where there is one."""
    if record is None or record.value is None:
        return None
    if record.spread is None:
        return record.value
    low, high = record.spread
    return f"{cell(record.value)} ({cell(low)} to {cell(high)})"
