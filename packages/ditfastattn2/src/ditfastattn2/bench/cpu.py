"""The CPU path: torch's attention on the visited keys alone, against torch's attention on all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import time_paired
from torch import Tensor

from ditfastattn2.bench.synthetic import windows_for
from ditfastattn2.functional import headwise_arrow_attention, plan_density

VISION, TEXT, HEADS, HEAD_DIM = 4096, 256, 8, 64
REMOVED = (0.0, 0.3, 0.5, 0.7, 0.9)


def run(context: BenchContext, rounds: int = 5) -> list[Record]:
    """Seconds of one attention layer of a 1024-pixel picture by the share of it that is removed."""
    generator = torch.Generator().manual_seed(context.seed)
    q, k, v = (torch.randn(1, VISION + TEXT, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    records = []
    for removed in context.track(REMOVED, "attention on the CPU"):
        windows = windows_for(HEADS, num_vision=VISION, num_text=TEXT, text_first=False, removed=removed)
        density = plan_density(windows, VISION, TEXT, False, (128, 64))
        settings = {
            "experiment": "cpu attention",
            "vision": VISION,
            "text": TEXT,
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "threads": torch.get_num_threads(),
            "density": round(density, 3),
        }

        def ours(windows: list[int] = windows) -> object:
            return headwise_arrow_attention(q, k, v, windows, TEXT, False, backend="sdpa")

        timings = time_paired({"torch": _dense(q, k, v), "visited keys": ours}, device="cpu", rounds=rounds, warmup=1)
        records += timings.records("ditfastattn2", "torch", settings)
    return records


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
