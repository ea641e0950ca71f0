"""Small inputs on which `headwise_arrow_attention` is checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...check import Case, every_layout
from .geometry import FULL, SKIP


class Shape(NamedTuple):
    """Sizes of one case; `block` None is the exact mask, `padded` gives the samples different valid text lengths."""

    vision: int
    text: int
    text_first: bool = False
    windows: tuple[int, ...] = (FULL, SKIP, 5)
    dim: int = 64
    batch: int = 1
    block: tuple[int, int] | None = (16, 16)
    padded: bool = False


SHAPES = (
    Shape(vision=50, text=0, windows=(4, FULL), batch=2),
    Shape(vision=70, text=13, windows=(3, SKIP, FULL, 20), padded=True, batch=2),
    Shape(vision=70, text=13, text_first=True, windows=(3, SKIP, FULL, 20), padded=True, batch=2),
    Shape(vision=61, text=33, text_first=True, windows=(8, 2), block=(32, 16), dim=72),
    Shape(vision=61, text=5, windows=(8, 100), block=(16, 32), dim=128),
    Shape(vision=40, text=9, windows=(1, FULL, 7), block=None, padded=True, batch=2),
    Shape(vision=40, text=9, text_first=True, windows=(1, 6), block=None, dim=40),
    Shape(vision=1, text=3, windows=(1, FULL), dim=16),
)
"""A last row block that holds both vision and text, text longer and shorter than a block, widths that are padded."""

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes and layouts."""
    generator = torch.Generator().manual_seed(seed)
    for place, shape in enumerate(SHAPES):
        for dtype in (torch.float32, (torch.bfloat16, torch.float16)[place % 2], torch.float64):
            yield Case(f"{shape} {dtype}", draw(shape, dtype, generator), tolerance=TOLERANCES[dtype])
    arguments = draw(Shape(vision=20, text=3), torch.float32, generator)
    for layout, laid in every_layout(arguments[0]):
        yield Case(f"strides {layout}", (laid, laid, laid, *arguments[3:]), tolerance=TOLERANCES[torch.float32])


def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Return the operator's arguments; what `out` holds in skipped heads must stay."""
    size = (shape.batch, shape.vision + shape.text, len(shape.windows), shape.dim)
    q, k, v, out = (torch.randn(size, generator=generator).to(dtype) for _ in range(4))
    valid = None
    if shape.padded:
        valid = torch.randint(0, shape.text + 1, (shape.batch,), generator=generator)
    rows, columns = shape.block or (0, 0)
    scale = shape.dim**-0.5
    return q, k, v, out, list(shape.windows), shape.text, shape.text_first, rows, columns, valid, scale
