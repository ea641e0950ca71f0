"""Windows of image models."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...bench import BenchCase
from . import reference


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield a window of 64 positions over image columns and whole vocabularies; a small one unless `full`."""
    shapes = ((1, 64, 8192), (4, 64, 8192), (1, 64, 65536)) if full else ((1, 16, 512),)
    for batch, width, columns in shapes:
        probs = torch.rand(batch, width, columns, device=device)
        positions = torch.arange(width, device=device).repeat(batch, 1)
        yield BenchCase(
            f"B{batch} K{width} V{columns}",
            (probs, torch.arange(batch, device=device), positions, 7, 0, 0, 0),
            bytes=probs.numel() * 4 + 8 * batch * width,
            # Ten rounds of six operations give four numbers; the rest is logarithms.
            flops=probs.numel() * 25,
            dtype=torch.float32,
            matrix=False,
            baselines={"torch": reference.sjd_gumbel_argmax},
        )
