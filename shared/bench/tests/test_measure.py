from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pared_bench.measure import energy, energy_source, flops, peak_memory
from pared_bench.measure.meters import _rapl
from torch.nn import functional
from torch.utils.flop_counter import flop_registry, register_flop_formula

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def custom_operator() -> object:
    library = torch.library.Library("pared_bench_test", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: 2 * x, "CompositeExplicitAutograd")
    yield torch.ops.pared_bench_test.double
    flop_registry.pop(torch.ops.pared_bench_test.double, None)
    library._destroy()


def test_a_product_counts_two_flops_per_multiply_add() -> None:
    count = flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5))
    assert count.total == 2 * 3 * 4 * 5
    assert count.uncounted == ()


def test_fused_attention_on_the_processor_counts() -> None:
    query = torch.ones(1, 2, 16, 8)
    count = flops(lambda: functional.scaled_dot_product_attention(query, query, query))
    assert count.total == 2 * 2 * (2 * 16 * 16 * 8)


def test_fused_attention_counts_where_torch_has_no_formula_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.delitem(flop_registry, operator, raising=False)
    test_fused_attention_on_the_processor_counts()


def test_nothing_is_computed_on_the_meta_device() -> None:
    huge = torch.empty(10**6, 10**6, device="meta")
    assert flops(lambda: huge @ huge).total == 2 * 10**18


def test_an_operator_without_a_formula_is_named(custom_operator: object) -> None:
    assert flops(lambda: custom_operator(torch.ones(3))).uncounted == ("pared_bench_test.double",)


def test_a_kernels_registered_formula_counts(custom_operator: object) -> None:
    register_flop_formula(custom_operator)(lambda x, *args, out_shape=None, **kwargs: 7 * x[0])
    count = flops(lambda: custom_operator(torch.ones(3)))
    assert (count.total, count.uncounted) == (21, ())


def test_a_formula_can_be_given_for_one_count(custom_operator: object) -> None:
    count = flops(lambda: custom_operator(torch.ones(3)), {custom_operator: lambda x, *a, out_shape=None, **k: x[0]})
    assert (count.total, count.uncounted) == (3, ())


def test_the_peak_is_what_was_alive_at_once() -> None:
    def run() -> torch.Tensor:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b + 1
        del b
        return c

    peak = peak_memory(run)
    assert (peak.bytes, peak.source) == (8000, "tensors")


def test_views_in_place_writes_and_older_tensors_do_not_count() -> None:
    old = torch.ones(1000)
    assert peak_memory(lambda: old.view(10, 100).add_(1).t()).bytes == 0
    assert peak_memory(lambda: old[:10] + 1).bytes == 40


def test_memory_is_counted_from_zero_each_time() -> None:
    kept = []
    assert peak_memory(lambda: kept.append(torch.ones(100))).bytes == 400
    assert peak_memory(lambda: kept.append(torch.ones(100))).bytes == 400


def _zone(folder: Path, name: str, microjoules: int, limit: int = 10**9) -> Path:
    zone = folder / name
    zone.mkdir()
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text(f"{limit}\n")
    return zone


def test_rapl_adds_the_packages_and_not_their_parts(tmp_path: Path) -> None:
    first, second = _zone(tmp_path, "intel-rapl:0", 100), _zone(tmp_path, "intel-rapl:1", 100)
    part = _zone(tmp_path, "intel-rapl:0:0", 100)
    counter, reason = _rapl(tmp_path)
    assert (counter.source, reason) == ("rapl", "")
    for zone, now in ((first, 2_000_100), (second, 3_000_100), (part, 9_000_100)):
        (zone / "energy_uj").write_text(str(now))
    assert counter.read() == 5.0


def test_rapl_goes_on_when_the_counter_starts_again_from_zero(tmp_path: Path) -> None:
    zone = _zone(tmp_path, "intel-rapl:0", 9_000_000, limit=10_000_000)
    counter, _ = _rapl(tmp_path)
    (zone / "energy_uj").write_text("1000000")
    assert counter.read() == 2.0
    (zone / "energy_uj").write_text("4000000")
    assert counter.read() == 5.0


def test_energy_is_joules_per_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = _zone(tmp_path, "intel-rapl:0", 0, limit=10**12)
    monkeypatch.setattr("pared_bench.measure.meters.RAPL", tmp_path)
    spent = 0

    def run() -> None:
        nonlocal spent
        spent += 3_000_000
        (zone / "energy_uj").write_text(str(spent))

    measured = energy(run, seconds=0.01)
    assert measured.joules == pytest.approx(3.0)
    assert measured.watts == pytest.approx(3.0 * measured.calls / measured.seconds)
    assert energy_source("cpu") == ("rapl", "")


def test_without_a_counter_energy_is_absent_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pared_bench.measure.meters.RAPL", tmp_path)
    calls = []
    measured = energy(lambda: calls.append(1))
    assert (measured.joules, measured.watts, measured.source) == (None, None, "absent")
    assert str(tmp_path) in measured.reason
    assert calls == []


def test_a_counter_that_only_root_may_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _zone(tmp_path, "intel-rapl:0", 1)

    def refuse(self: Path, *_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    counter, reason = _rapl(tmp_path)
    assert counter is None
    assert reason.startswith(f"no permission to read {tmp_path}")


def test_a_window_of_no_length_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        energy(lambda: None, seconds=0)


@pytest.mark.gpu
@needs_gpu
def test_the_gpus_counter_moves_with_work() -> None:
    large = torch.randn(4096, 4096, device="cuda")
    measured = energy(lambda: large @ large, device="cuda", seconds=1.0)
    assert measured.source == "nvml", measured.reason
    assert measured.watts is not None
    assert measured.watts > 20


@pytest.mark.gpu
@needs_gpu
def test_the_gpus_peak_is_what_a_call_needs_beyond_what_was_there() -> None:
    there = torch.ones(1 << 20, device="cuda")
    assert peak_memory(lambda: there + 1, "cuda").bytes == 4 << 20
