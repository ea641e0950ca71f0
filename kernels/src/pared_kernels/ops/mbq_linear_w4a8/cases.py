"""Small inputs on which `mbq_linear_w4a8` is checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...bitstream import pack_dense
from ...check import FLOATS, Case, every_layout

# rows of x, columns, rows of the weight, bias
SHAPES = ((1, 64, 5, True), (3, 128, 70, False), (17, 192, 33, True), (70, 64, 9, True), (530, 64, 3, False))


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes and dtypes; one token of each x is zero, and columns of an odd multiple of 32 occur."""
    generator = torch.Generator().manual_seed(seed)
    for shape in (*SHAPES, (2, 96, 4, True)):
        # Hundreds of tokens, for the largest tiles, take the interpreter long.
        for dtype in FLOATS if shape[0] < 500 else (torch.float16,):
            arguments = draw(*shape, dtype, generator)
            layouts = every_layout(arguments[0]) if shape == SHAPES[1] else [("contiguous", arguments[0])]
            for layout, x in layouts:
                # The token scale is float32 by definition, also for float64.
                tolerance = 1e-6 if dtype == torch.float64 else None
                yield Case(f"{shape} {dtype} {layout}", (x, *arguments[1:]), tolerance=tolerance)


def draw(
    many: int, columns: int, rows: int, has_bias: bool, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, ...]:
    """Return the operator's arguments for random codes, scales in float16."""
    x = torch.randn(many, columns, generator=generator).to(dtype)
    x[-1] = 0
    packed = pack_dense(torch.randint(16, (rows, columns), generator=generator), 4)
    scales = (0.01 + 0.1 * torch.rand(rows, 1, generator=generator)).half()
    bias = torch.randn(rows, generator=generator).to(dtype) if has_bias else None
    return x, packed, scales, bias
