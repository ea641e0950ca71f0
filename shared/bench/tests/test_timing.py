from __future__ import annotations

import gc
import statistics

import pytest
import torch
from pared_bench.measure import Timings, time_paired, timing


class Clock:
    """Time that passes only when a candidate says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "process_time", lambda: self.now)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def taking(self, seconds: float, calls: list[str] | None = None, name: str = "") -> object:
        def run() -> None:
            self.now += seconds
            if calls is not None:
                calls.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_times_are_seconds_per_call_and_the_ratio_is_paired(clock: Clock) -> None:
    timings = time_paired({"base": clock.taking(0.02), "ours": clock.taking(0.005)}, rounds=5)
    assert timings.clock == "process"
    assert timings.median("base") == pytest.approx(0.02)
    assert timings.median("ours") == pytest.approx(0.005)
    ratio = timings.speedup("ours", "base")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((4.0, 4.0, 4.0))


def test_short_candidates_are_repeated_within_a_sample(clock: Clock) -> None:
    calls: list[str] = []
    time_paired({"short": clock.taking(0.001, calls, "s")}, rounds=2, warmup=1, sample_seconds=0.01)
    assert len(calls) in (1 + 2 * 10, 1 + 2 * 11)


def test_every_round_takes_each_candidate_once_in_changing_order(clock: Clock) -> None:
    calls: list[str] = []
    candidates = {name: clock.taking(1.0, calls, name) for name in "abc"}
    time_paired(candidates, rounds=20, warmup=1)
    rounds = ["".join(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert len(rounds) == 20
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len(set(rounds)) > 1


def test_the_ratio_survives_a_machine_that_slows_down(clock: Clock) -> None:
    pace = iter(range(10, 10_000))

    def taking(factor: float) -> object:
        def run() -> None:
            clock.now += factor * next(pace)

        return run

    timings = time_paired({"base": taking(2.0), "ours": taking(1.0)}, rounds=100)
    assert timings.speedup("ours", "base").value == pytest.approx(2.0, rel=0.05)


def test_the_interval_widens_with_the_noise() -> None:
    steady = Timings({"base": (2.0,) * 9, "ours": (1.0,) * 9}, "wall").speedup("ours", "base")
    noisy = Timings({"base": (2.0,) * 9, "ours": (0.5, 2.0, 1.0) * 3}, "wall").speedup("ours", "base")
    assert steady.high - steady.low == 0
    assert noisy.low < noisy.value < noisy.high


def test_the_budget_ends_the_rounds_but_not_before_three(clock: Clock) -> None:
    timings = time_paired({"slow": clock.taking(10.0)}, rounds=50, budget_seconds=45.0)
    assert len(timings.samples["slow"]) == 5
    timings = time_paired({"slow": clock.taking(10.0)}, rounds=50, budget_seconds=1.0)
    assert len(timings.samples["slow"]) == 3


def test_quartiles_are_the_spread() -> None:
    timings = Timings({"a": (5.0, 1.0, 3.0, 2.0, 4.0)}, "wall")
    assert timings.spread("a") == (2.0, 4.0)
    assert timings.median("a") == statistics.median((1, 2, 3, 4, 5))


def test_records_hold_times_and_speedups_with_their_clock() -> None:
    records = Timings({"base": (0.2, 0.2), "ours": (0.1, 0.1)}, "wall").records("dato", "base", {"batch": 2})
    assert [(r.variant, r.metric, r.value, r.unit) for r in records] == [
        ("base", "time", 200.0, "ms"),
        ("ours", "time", 100.0, "ms"),
        ("ours", "speed-up over base", 2.0, "×"),
    ]
    assert records[0].settings == {"batch": 2, "clock": "wall"}


def test_the_garbage_collector_is_on_again_after_a_candidate_failed() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        time_paired({"a": fail}, warmup=1)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": {}}, "candidates must name at least one"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"clock": "sun"}, "clock must be .*, got 'sun'"),
        ({"clock": "events"}, "needs a CUDA device, got cpu"),
    ],
)
def test_wrong_arguments_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        time_paired(**{"candidates": {"a": lambda: None}, **options})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_events_time_the_device_and_not_the_launch() -> None:
    large = torch.randn(4096, 4096, device="cuda")
    timings = time_paired(
        {"one": lambda: large @ large, "four": lambda: [large @ large for _ in range(4)]}, device="cuda"
    )
    assert timings.clock == "events"
    assert timings.speedup("one", "four").value == pytest.approx(4.0, rel=0.2)
