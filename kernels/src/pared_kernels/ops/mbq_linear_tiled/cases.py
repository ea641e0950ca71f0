"""Small inputs on which `mbq_linear_tiled` is checked: whole and split groups, full blocks and what is left of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...check import FLOATS, Case, every_layout
from ..mbq_linear_w16 import cases as dense
from .layout import tile

# rows of x, columns, rows of the weight, bits, group, symmetric, bias
SHAPES = (
    (1, 64, 16, 4, 32, False, True),
    (1, 1024, 80, 3, 128, False, False),
    (3, 256, 160, 3, 64, True, True),
    (2, 128, 64, 3, 64, False, True),
    (5, 192, 48, 4, 192, True, False),
    (17, 576, 32, 3, 64, False, True),
    (100, 256, 80, 3, 32, False, False),
    (130, 96, 272, 4, 96, False, True),
)


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes and dtypes; strides of x for one of them."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        for dtype in FLOATS:
            arguments = draw(*shape, dtype, generator)
            layouts = every_layout(arguments[0]) if shape == SHAPES[2] else [("contiguous", arguments[0])]
            for layout, x in layouts:
                yield Case(f"{shape} {dtype} {layout}", (x, *arguments[1:]))


def draw(
    many: int,
    columns: int,
    rows: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    has_bias: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Any, ...]:
    """Return the operator's arguments for random codes."""
    drawn = dense.draw(many, columns, rows, bits, group_size, symmetric, has_bias, dtype, generator)
    x, packed, scales, zeros, _, _, bias = drawn
    return x, *tile(packed, scales, zeros, bits, group_size), bits, group_size, bias
