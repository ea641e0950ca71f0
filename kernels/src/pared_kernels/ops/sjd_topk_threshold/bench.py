"""Rows of image models: top-k 2000 of 8192 image columns, and of a whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...bench import BenchCase
from . import reference


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield a window of 64 rows; a small one unless `full`."""
    shapes = ((64, 8192, 2000), (64, 65536, 2000), (16, 65536, 2000)) if full else ((16, 2048, 200),)
    for rows, columns, k in shapes:
        for dtype in (torch.bfloat16, torch.float32) if full else (torch.float32,):
            logits = torch.randn(rows, columns, device=device).to(dtype)
            yield BenchCase(
                f"R{rows} V{columns} k{k}",
                (logits, k),
                bytes=logits.numel() * logits.element_size() + 4 * rows,
                flops=4 * logits.numel(),
                dtype=torch.float32,
                matrix=False,
                baselines={"torch": reference.sjd_topk_threshold},
            )
