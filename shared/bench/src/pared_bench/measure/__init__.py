"""Measuring time, FLOPs, memory and energy."""

from __future__ import annotations

from pared_bench.measure.memory import PeakMemory, peak_memory
from pared_bench.measure.meters import Energy, energy, energy_source
from pared_bench.measure.operations import FlopCount, flops
from pared_bench.measure.timing import Ratio, Timings, time_paired

__all__ = [
    "Energy",
    "FlopCount",
    "PeakMemory",
    "Ratio",
    "Timings",
    "energy",
    "energy_source",
    "flops",
    "peak_memory",
    "time_paired",
]
