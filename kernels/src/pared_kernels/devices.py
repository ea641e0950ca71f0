"""Peak bandwidth and arithmetic of devices, the two sides of the roofline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Peak:
    """Bytes per second of memory, FLOP per second of 16-bit matrix products with float32 sums, and of float32.

    `measured` tells that the numbers are what torch reached here, not those of a data sheet.
    """

    name: str
    bandwidth: float
    half: float
    single: float
    measured: bool = False

    def seconds(self, bytes: int, flops: int, dtype: torch.dtype, *, matrix: bool) -> float:
        """Return the least time for this traffic and arithmetic; `matrix`: the arithmetic is matrix products."""
        half = matrix and dtype in (torch.float16, torch.bfloat16)
        return max(bytes / self.bandwidth, flops / (self.half if half else self.single))


# Part of the device name, memory in TB/s, dense 16-bit and float32 rates in TFLOP/s (vendors' data sheets). The first
# match wins, so longer names come first.
_DATA_SHEETS = (
    ("B200", 8.0, 2250.0, 75.0),
    ("H200", 4.8, 989.4, 66.9),
    ("H100 PCIe", 2.0, 756.0, 51.0),
    ("H100", 3.35, 989.4, 66.9),
    ("A100-SXM4-80GB", 2.039, 312.0, 19.5),
    ("A100 80GB PCIe", 1.935, 312.0, 19.5),
    ("A100", 1.555, 312.0, 19.5),
    ("L40S", 0.864, 362.0, 91.6),
    ("L4", 0.3, 121.0, 30.3),
    ("A10G", 0.6, 70.0, 35.0),
    ("RTX 5090", 1.792, 209.5, 104.8),
    ("RTX 4090", 1.008, 165.2, 82.6),
    ("RTX 3090", 0.936, 71.0, 35.6),
    ("MI300X", 5.3, 1307.4, 163.4),
    ("RX 7900 XTX", 0.96, 122.8, 61.4),
)


@cache
def peak(device: torch.device) -> Peak:
    """Return the peak rates of `device`: from the data sheet of a known GPU, otherwise measured with torch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, terabytes, half, single in _DATA_SHEETS:
            if part in name:
                return Peak(name, terabytes * 1e12, half * 1e12, single * 1e12)
        return _measure(name, device, 2**28, 4096)
    return _measure(device.type, device, 2**25, 512)


def _measure(name: str, device: torch.device, bytes: int, size: int) -> Peak:
    source = torch.zeros(bytes // 4, device=device)
    copy = torch.empty_like(source)
    bandwidth = 2 * bytes / _best(device, lambda: copy.copy_(source))
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(size, size, device=device, dtype=dtype)
        rates[dtype] = 2 * size**3 / _best(device, lambda a=a: a @ a)  # type: ignore[misc]
    return Peak(name, bandwidth, rates[torch.bfloat16], rates[torch.float32], measured=True)


def _best(device: torch.device, run: Callable[[], object]) -> float:
    times = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
