"""Times of several ways to do one thing, taken in turns so that drift of the machine hits all alike."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pared_bench.results import Record

Clock = Literal["events", "process", "wall"]


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    """Seconds per call of each candidate, one sample per round; samples of equal index were taken in the same round.

    `clock` is "events" (CUDA events), "process" (CPU time of the whole process, all threads together) or "wall".
    """

    samples: Mapping[str, tuple[float, ...]]
    clock: Clock

    def median(self, name: str) -> float:
        """Return the median seconds per call."""
        return statistics.median(self.samples[name])

    def spread(self, name: str) -> tuple[float, float]:
        """Return the first and third quartile of the seconds per call."""
        ordered = sorted(self.samples[name])
        return _quantile(ordered, 0.25), _quantile(ordered, 0.75)

    def speedup(self, name: str, baseline: str, *, resamples: int = 1000, seed: int = 0) -> Ratio:
        """Return how many times faster `name` is than `baseline`: the median over rounds of their ratio of times."""
        pairs = zip(self.samples[baseline], self.samples[name], strict=True)
        ratios = [slow / fast for slow, fast in pairs]
        generator = random.Random(seed)
        medians = sorted(
            statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(resamples if ratios else 0)
        )
        return Ratio(statistics.median(ratios), _quantile(medians, 0.025), _quantile(medians, 0.975))

    def records(self, method: str, baseline: str, settings: Mapping[str, Any] | None = None) -> list[Record]:
        """Return each candidate's time in milliseconds, and for all but `baseline` the speed-up over it."""
        settings = {**(settings or {}), "clock": self.clock}
        rounds = len(self.samples[baseline])
        records = []
        for name in self.samples:
            low, high = self.spread(name)
            milliseconds = (1e3 * low, 1e3 * high)
            records.append(
                Record(method, name, "time", 1e3 * self.median(name), "ms", settings, milliseconds, samples=rounds)
            )
            if name != baseline:
                ratio = self.speedup(name, baseline)
                span = (ratio.low, ratio.high)
                records.append(
                    Record(method, name, f"speed-up over {baseline}", ratio.value, "×", settings, span, samples=rounds)
                )
        return records


def time_paired(
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 20,
    warmup: int = 3,
    sample_seconds: float = 0.01,
    budget_seconds: float | None = None,
    clock: Literal["auto", "events", "process", "wall"] = "auto",
    seed: int = 0,
) -> Timings:
    """Time the candidates in interleaved rounds of random order, after a warm-up.

    A sample repeats its candidate until about `sample_seconds` have passed and holds the time per call. `clock` "auto"
    is CUDA events on a GPU and process time elsewhere; process time ignores other programs on a busy machine, wall time
    is what a user waits. With `budget_seconds`, no further round begins after that much wall time (three at least).

    Raises ValueError for no candidates, fewer than one round, or a clock the device does not have.
    """
    if not candidates:
        raise ValueError("candidates must name at least one function, got none")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    chosen: Clock = ("events" if on_gpu else "process") if clock == "auto" else clock
    if chosen not in ("events", "process", "wall"):
        raise ValueError(f"clock must be 'auto', 'events', 'process' or 'wall', got {clock!r}")
    if chosen == "events" and not on_gpu:
        raise ValueError(f"clock 'events' needs a CUDA device, got {device}")

    sample = _event_sample(device) if chosen == "events" else _clock_sample(chosen, device if on_gpu else None)
    calls = {}
    for name, run in candidates.items():
        for _ in range(max(warmup, 1)):
            once = sample(run, 1)
        calls[name] = max(1, math.ceil(sample_seconds / max(once, 1e-9))) if once < sample_seconds else 1
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(seed)
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            if budget_seconds is not None and index >= 3 and time.perf_counter() - start > budget_seconds:
                break
            shuffle.shuffle(order)
            for name in order:
                samples[name].append(sample(candidates[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return Timings({name: tuple(values) for name, values in samples.items()}, chosen)


def _event_sample(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    # an event belongs to a stream of one GPU: recorded on another, it would not wait for the work
    stream = torch.cuda.current_stream(device)

    def sample(run: Callable[[], object], calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record(stream)
        for _ in range(calls):
            run()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return sample


def _clock_sample(clock: Clock, gpu: torch.device | None) -> Callable[[Callable[[], object], int], float]:
    read = time.process_time if clock == "process" else time.perf_counter

    def sample(run: Callable[[], object], calls: int) -> float:
        if gpu is not None:
            torch.cuda.synchronize(gpu)
        begin = read()
        for _ in range(calls):
            run()
        if gpu is not None:
            torch.cuda.synchronize(gpu)
        # a clock that has not moved would make ratios infinite
        return max(read() - begin, 1e-9) / calls

    return sample


def _quantile(ordered: list[float], share: float) -> float:
    """Return a quantile of sorted numbers, linear between neighbours."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
