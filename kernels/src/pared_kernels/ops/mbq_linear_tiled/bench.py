"""Linear layers of Qwen2-7B in 3 and 4 bits, groups of 128, in blocks; on a CPU alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...bench import BenchCase
from ..mbq_linear_w16.bench import SHAPES, SMALL, dense
from .cases import draw
from .reference import mbq_linear_tiled


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield decoding (1 to 16 rows of x) and a short prompt; one small layer unless `full`, and none off the CPU."""
    if device.type != "cpu":
        return
    generator = torch.Generator().manual_seed(0)
    for rows, columns in SHAPES if full else SMALL:
        for bits in (3, 4):
            for many in (1, 4, 16, 128) if full else (1, 16):
                arguments = draw(many, columns, rows, bits, 128, False, False, torch.bfloat16, generator)
                x, tiles, steps = arguments[:3]
                weight = torch.randn(rows, columns, dtype=torch.bfloat16)
                yield BenchCase(
                    f"W{bits} g128 M{many} N{rows} K{columns}",
                    arguments,
                    bytes=tiles.nbytes + steps.nbytes + x.nbytes + x.element_size() * many * rows,
                    flops=2 * many * rows * columns,
                    dtype=x.dtype,
                    matrix=True,
                    baselines={"torch": mbq_linear_tiled, "dense": dense(weight)},
                )
