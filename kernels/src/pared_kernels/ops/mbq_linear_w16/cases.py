"""Small inputs on which `mbq_linear_w16` is checked: every width, both kinds of zero point, every way of the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...bitstream import pack_dense
from ...check import FLOATS, Case, every_layout

# rows of x, columns, rows of the weight, bits, group, symmetric, bias
SHAPES = (
    (1, 64, 5, 3, 32, False, True),
    (1, 2048, 70, 3, 128, False, False),
    (1, 96, 9, 4, 96, True, True),
    (3, 128, 70, 3, 64, False, True),
    (2, 64, 3, 2, 32, True, False),
    (17, 128, 33, 4, 128, False, True),
    (40, 64, 20, 3, 32, True, True),
    (70, 64, 65, 5, 64, False, False),
    (2, 96, 6, 7, 32, False, True),
    (1, 64, 4, 8, 64, True, False),
    (260, 64, 6, 6, 32, False, True),
)


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes and dtypes; strides of x for one of them."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        for dtype in FLOATS:
            arguments = draw(*shape, dtype, generator)
            layouts = every_layout(arguments[0]) if shape == SHAPES[3] else [("contiguous", arguments[0])]
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
    """Return the operator's arguments for random codes, scales in float16."""
    groups = columns // group_size
    x = torch.randn(many, columns, generator=generator).to(dtype)
    codes = torch.randint(2**bits, (rows, columns), generator=generator)
    scales = (0.01 + 0.1 * torch.rand(rows, groups, generator=generator)).half()
    zeros: Tensor | None = None
    if not symmetric:
        zeros = pack_dense(torch.randint(2**bits, (rows, groups), generator=generator), bits, dim=0)
    bias = torch.randn(rows, generator=generator).to(dtype) if has_bias else None
    return x, pack_dense(codes, bits), scales, zeros, bits, group_size, bias
