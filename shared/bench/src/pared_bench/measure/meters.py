"""Energy of a call, from the counter in the GPU (NVML) or the processor (RAPL)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Joules per call, with mean watts over `calls` calls in `seconds`; both None, and `reason` says why, when absent.

    `source` is "nvml", "rapl" or "absent". The counters cover the whole device: other programs on it count too.
    """

    joules: float | None
    watts: float | None
    calls: int
    seconds: float
    source: str
    reason: str = ""


@dataclass(frozen=True)
class _Counter:
    source: str
    read: Callable[[], float]


def energy(
    run: Callable[[], object], *, device: torch.device | str = "cpu", seconds: float = 2.0, warmup: int = 2
) -> Energy:
    """Measure the energy of one call of `run`, averaged over the calls that fit into `seconds`.

    The counters move in steps (NVML's about every tenth of a second), so windows under two seconds are coarse. Where
    there is no counter the result is absent with the reason, never an estimate. Raises ValueError when `seconds` is not
    positive.
    """
    if seconds <= 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    device = torch.device(device)
    counter, reason = _counter(device)
    if counter is None:
        return Energy(None, None, 0, 0.0, "absent", reason)
    for _ in range(warmup):
        run()
    _synchronize(device)
    calls, begin, joules = 0, time.perf_counter(), counter.read()
    while time.perf_counter() - begin < seconds:
        run()
        # without waiting, a GPU would queue many more calls than fit into the window
        _synchronize(device)
        calls += 1
    joules = counter.read() - joules
    elapsed = time.perf_counter() - begin
    return Energy(joules / calls, joules / elapsed, calls, elapsed, counter.source)


def energy_source(device: torch.device | str = "cpu") -> tuple[str, str]:
    """Return ("nvml" or "rapl", "") when energy can be measured on the device, else ("absent", why not)."""
    counter, reason = _counter(torch.device(device))
    return ("absent", reason) if counter is None else (counter.source, "")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _counter(device: torch.device) -> tuple[_Counter | None, str]:
    if device.type == "cuda":
        return _nvml(device)
    if device.type == "cpu":
        return _rapl(RAPL)
    return None, f"no energy counter is known for {device.type} devices"


def _nvml(device: torch.device) -> tuple[_Counter | None, str]:
    try:
        import pynvml
    except ModuleNotFoundError:
        return None, "nvidia-ml-py is not installed; type: pip install 'pared-bench[energy]'"
    try:
        pynvml.nvmlInit()
        # by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return None, f"NVML gives no energy counter here: {error}"

    def read() -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

    return _Counter("nvml", read), ""


def _rapl(folder: Path) -> tuple[_Counter | None, str]:
    # intel-rapl:0 is a package (AMD processors appear under the same name); intel-rapl:0:0 a part of it
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    if not zones:
        return None, f"this machine shows no RAPL counter under {folder}"
    try:
        counters = [_RaplZone(zone) for zone in zones]
    except PermissionError as error:
        return None, f"no permission to read {error.filename}; as root: chmod a+r {folder}/intel-rapl:*/energy_uj"
    except (OSError, ValueError) as error:
        return None, f"the RAPL counter cannot be read: {error}"
    return _Counter("rapl", lambda: sum(zone.joules() for zone in counters)), ""


class _RaplZone:
    """One package's counter, which starts again from zero at `max_energy_range_uj`."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = self._read()
        self._total = 0

    def joules(self) -> float:
        """Return the joules since this object was made."""
        now = self._read()
        self._total += (now - self._last) % self._range
        self._last = now
        return self._total / 1e6

    def _read(self) -> Any:
        return int(self._file.read_text())
