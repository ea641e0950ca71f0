"""Speed of every backend of every operator: time, share of the roofline, and ratio to plain torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import dispatch
from .devices import peak
from .registry import Operator, choose

# Larger than the last-level cache of any GPU here, so that a run finds nothing of the one before.
FLUSH_BYTES = 2**28


@dataclass(frozen=True)
class BenchCase:
    """One set of arguments to time; an operator's `bench.py` yields them from `cases(device, full)`.

    `bytes` and `flops` are what the operator must at least read, write and compute, `matrix` tells that the arithmetic
    is matrix products in `dtype`. `baselines` holds other ways to the same result, called with the same arguments;
    "torch" is plain torch, further ones are public kernels. An operator that writes in place gets the same tensors in
    every run.
    """

    label: str
    arguments: tuple[Any, ...]
    bytes: int
    flops: int
    dtype: torch.dtype
    matrix: bool
    baselines: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One backend or baseline on one case. `spread` is the interquartile range over the median, `roofline` the share of
    the device's peak that was reached, `speedup` the median of the paired ratios to "torch" (None without it)."""

    operator: str
    case: str
    dtype: str
    way: str
    device: str
    microseconds: float
    spread: float
    bytes: int
    flops: int
    roofline: float
    speedup: float | None


def run(
    ops: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    *,
    full: bool | None = None,
    seconds: float = 0.5,
) -> list[Measurement]:
    """Time operators `ops` (None: all) on `device` (None: a GPU if present), about `seconds` for each case.

    `full` takes the full-size cases, by default on a GPU only. The ways of a case take turns, so that their ratios do
    not suffer from a clock that drifts; on a GPU the cache is flushed before each run.

    Raises:
        ValueError: for an operator that does not exist.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    large = place.type != "cpu" if full is None else full
    measurements = []
    for operator in choose(ops):
        if operator.has_part("bench"):
            for case in operator.part("bench").cases(place, large):
                measurements += measure(operator, case, place, seconds)
    return measurements


def measure(operator: Operator, case: BenchCase, device: torch.device, seconds: float) -> list[Measurement]:
    """Time every backend and baseline of one case on `device`."""
    # The interpreter, through which Triton runs on the CPU, says nothing of speed.
    timed = ("cpu",) if device.type == "cpu" else ("triton",)
    ways: dict[str, Callable[..., Any]] = {
        backend: _through(operator, backend)
        for backend in operator.backends
        if backend in timed and dispatch.why_not(operator, backend, case.arguments) is None
    }
    ways = {**ways, **case.baselines} if ways else {"reference": _through(operator, "reference"), **case.baselines}
    times = take_turns({way: _call(function, case.arguments) for way, function in ways.items()}, device, seconds)
    ceiling = peak(device).seconds(case.bytes, case.flops, case.dtype, matrix=case.matrix)
    measurements = []
    for way, taken in times.items():
        median = statistics.median(taken)
        low, _, high = statistics.quantiles(taken, n=4)
        ratios = [theirs / ours for theirs, ours in zip(times.get("torch", ()), taken, strict=False)]
        measurements.append(
            Measurement(
                operator.name,
                case.label,
                str(case.dtype).removeprefix("torch."),
                way,
                peak(device).name,
                round(median * 1e6, 2),
                round((high - low) / median, 3),
                case.bytes,
                case.flops,
                round(ceiling / median, 4),
                round(statistics.median(ratios), 3) if ratios else None,
            )
        )
    return measurements


def take_turns(ways: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each run of each way: one of each in turn, for about `seconds` in all, 5 to 200 rounds."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if device.type == "cuda" else None
    for way in ways.values():
        way()
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    for turn in range(200):
        if turn >= 5 and time.perf_counter() > end:
            break
        for name, way in ways.items():
            times[name].append(_time_gpu(way, flush) if flush is not None else _time_cpu(way))
    return times


def _time_gpu(way: Callable[[], Any], flush: torch.Tensor) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The flush also keeps the GPU busy while the host prepares the launches, which are then not part of the time.
    flush.zero_()
    start.record()
    way()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _time_cpu(way: Callable[[], Any]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def _through(operator: Operator, backend: str) -> Callable[..., Any]:
    def run_operator(*arguments: Any) -> Any:
        with dispatch.use(**{operator.name: backend}):
            return operator(*arguments)

    return run_operator


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: function(*arguments)
