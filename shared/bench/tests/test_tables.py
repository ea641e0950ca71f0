from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from pared_bench import Record
from pared_bench.environment import Environment
from pared_bench.report import markdown, markdown_table
from pared_bench.results import Table
from pared_bench.store import StoredRecord
from pared_bench.tables import Bar, Chart, cell, sections


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (7, "7"),
        (12345, "12,345"),
        (0.0, "0"),
        (0.123456, "0.1235"),
        (12.3456, "12.35"),
        (12345.6, "12,346"),
        (0.00012345, "0.000123"),
        (np.float32(0.1), "0.1"),
        (np.int64(12345), "12,345"),
        ((32, 32), "32 × 32"),
        ("as it is", "as it is"),
    ],
)
def test_a_cell_is_short_and_readable(value: object, text: str) -> None:
    assert cell(value) == text


def _stored(environment: Environment, *records: Record) -> list[StoredRecord]:
    return [StoredRecord("dato", record, environment) for record in records]


def test_variants_become_rows_and_metrics_columns(environment: Environment) -> None:
    common = {"experiment": "speed", "steps": 50}
    stored = _stored(
        environment,
        Record("dato", "base", "time", 2.0, "ms", {**common, "batch": 1}),
        Record("dato", "ours", "time", 1.0, "ms", {**common, "batch": 1}, spread=(0.9, 1.1)),
        Record("dato", "ours", "psnr", 30.0, "dB", {**common, "batch": 1}),
        Record("dato", "ours", "time", 3.0, "ms", {**common, "batch": 8}),
        Record("dato", "ours", "psnr", None, "dB", {**common, "batch": 8}, note="out of memory"),
    )
    (section,) = sections(stored)
    assert section.table.title == "dato: speed"
    assert list(section.table.columns) == ["variant", "batch", "time [ms]", "psnr [dB]"]
    assert [list(row) for row in section.table.rows] == [
        ["base", 1, 2.0, None],
        ["ours", 1, "1 (0.9 to 1.1)", 30.0],
        ["ours", 8, 3.0, None],
    ]
    assert section.table.note == "steps 50. ours, psnr: out of memory"


def test_experiments_and_devices_stand_apart(environment: Environment) -> None:
    other = dataclasses.replace(environment, device="CPU x", slug="cpu-x")
    stored = [
        *_stored(environment, Record("dato", "ours", "time", 1.0, "ms", {"experiment": "speed"})),
        *_stored(environment, Record("dato", "ours", "fd", 1.0, "", {"experiment": "quality"})),
        *_stored(other, Record("dato", "ours", "time", 9.0, "ms", {"experiment": "speed"})),
    ]
    assert [(s.table.title, s.environment.slug) for s in sections(stored)] == [
        ("dato: speed", "nvidia-h200"),
        ("dato: quality", "nvidia-h200"),
        ("dato: speed", "cpu-x"),
    ]


def test_a_metric_of_several_rows_becomes_a_chart(environment: Environment) -> None:
    stored = _stored(
        environment,
        Record("dato", "base", "time", 2.0, "ms", {"batch": 1}),
        Record("dato", "ours", "time", 1.0, "ms", {"batch": 8}, spread=(0.9, 1.1)),
        Record("dato", "ours", "psnr", 30.0, "dB", {"batch": 8}),
        Record("dato", "base", "psnr", None, "dB", {"batch": 1}, note="out of memory"),
    )
    (section,) = sections(stored)
    assert section.charts == [
        Chart("time [ms]", [Bar("base, batch 1", 2.0, None), Bar("ours, batch 8", 1.0, (0.9, 1.1))])
    ]


def test_numbers_of_an_older_commit_are_owned_up_to(environment: Environment) -> None:
    older = dataclasses.replace(environment, date="2025-12-01T00:00:00Z", commit="fedcba987654")
    stored = [
        *_stored(environment, Record("dato", "ours", "time", 1.0, "ms")),
        *_stored(older, Record("dato", "base", "time", 2.0, "ms")),
    ]
    (section,) = sections(stored)
    assert section.environment == environment
    assert section.table.note == "Oldest number: 2025-12-01, commit fedcba987654"


def test_markdown_escapes_what_would_break_a_table() -> None:
    text = markdown_table(Table("t", ["a|b", "n"], [["x|y\nz", 1.5]], "why"))
    assert text.splitlines() == ["| a\\|b | n |", "| --- | ---: |", "| x\\|y z | 1.5 |", "", "*why*"]


def test_markdown_of_results_names_device_date_versions_and_seed(environment: Environment) -> None:
    text = markdown(_stored(environment, Record("dato", "ours", "time", 1.0, "ms")))
    assert text.startswith("## NVIDIA H200\n\n### dato\n\n| variant | time [ms] |\n| --- | ---: |\n| ours | 1 |")
    assert "Measured: 2026-01-02; python 3.12.1, torch 2.11.0; commit 0123456789ab; seed 7." in text


def test_markdown_without_results_says_so() -> None:
    assert markdown([]) == "Nothing has been measured yet.\n"
