"""Total variation between the law of the output and plain sampling, by enumeration."""

from __future__ import annotations

from pared_bench import BenchContext, Record

from sjd.exactness import deviations


def run(context: BenchContext) -> list[Record]:
    """One number for every mode and toy; the control is the published bookkeeping, whose deviation is the point."""
    records = []
    for one in context.track(deviations(context.seed), "enumerating"):
        settings = {
            "experiment": "exactness",
            "vocabulary": one.vocab,
            "length": one.length,
            "window": one.window,
            "exact": one.exact,
        }
        records.append(Record("sjd", one.mode, "total variation", one.total_variation, "", settings))
    return records
