from __future__ import annotations

import time

import pytest
import torch
from pared_kernels import bench, devices, registry

CPU = torch.device("cpu")


def test_every_operator_is_timed_against_plain_torch(monkeypatch):
    monkeypatch.setattr(devices, "_measure", lambda name, *rest: devices.Peak(name, 1e10, 1e11, 1e10, measured=True))
    devices.peak.cache_clear()
    rows = bench.run(device="cpu", seconds=0.0)
    devices.peak.cache_clear()
    assert {row.operator for row in rows} == set(registry.operators())
    for row in rows:
        assert row.microseconds > 0
        assert row.bytes > 0
        assert row.speedup is not None
    assert all(row.speedup == 1.0 for row in rows if row.way == "torch")


def test_a_slower_way_has_a_speedup_below_one():
    def slow(*arguments):
        time.sleep(0.003)

    times = bench.take_turns({"fast": lambda: None, "slow": slow}, CPU, 0.0)
    assert len(times["fast"]) == len(times["slow"]) >= 5
    assert min(times["slow"]) >= 0.003 > max(times["fast"])


def test_roofline_is_the_slower_of_memory_and_arithmetic():
    peak = devices.Peak("some", bandwidth=1e12, half=1e15, single=1e14)
    assert peak.seconds(10**12, 1, torch.float16, matrix=True) == 1.0
    assert peak.seconds(1, 10**15, torch.float16, matrix=True) == 1.0
    assert peak.seconds(1, 10**15, torch.float32, matrix=True) == 10.0
    assert peak.seconds(1, 10**15, torch.float16, matrix=False) == 10.0


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA H100 PCIe", 2.0e12), ("NVIDIA H200", 4.8e12), ("NVIDIA L40S", 864e9)],
)
def test_peaks_of_known_gpus_come_from_their_data_sheets(name, bandwidth, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    devices.peak.cache_clear()
    found = devices.peak(torch.device("cuda"))
    devices.peak.cache_clear()
    assert (found.bandwidth, found.measured) == (bandwidth, False)


def test_full_cases_build_on_meta_tensors_with_consistent_counts():
    for operator in registry.operators().values():
        cases = list(operator.part("bench").cases(torch.device("meta"), True))
        # An operator without a Triton kernel has none off the CPU.
        assert bool(cases) == ("triton" in operator.backends)
        assert all(case.bytes > 0 and case.flops > 0 and "torch" in case.baselines for case in cases)
