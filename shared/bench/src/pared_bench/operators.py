"""Speed measurements of the shared operators as records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pared_bench.results import Record

#: The name the operators' numbers are stored under.
PACKAGE = "pared-kernels"


def operator_records(measurements: Iterable[Any]) -> list[Record]:
    """Return what `pared_kernels.bench.run` measured as records: time, share of the roofline, speed-up over torch.

    The operator is the method, the backend or baseline the variant; the spread of a time is half its interquartile
    range to either side.
    """
    records = []
    for item in measurements:
        settings = {"case": item.case, "dtype": item.dtype}
        half = item.microseconds * item.spread / 2
        span = (item.microseconds - half, item.microseconds + half)
        records.append(Record(item.operator, item.way, "time", item.microseconds, "µs", settings, span))
        records.append(Record(item.operator, item.way, "roofline", 100 * item.roofline, "%", settings))
        if item.speedup is not None:
            records.append(Record(item.operator, item.way, "speed-up over torch", item.speedup, "×", settings))
    return records
