"""Small inputs on which `cskv_append` is checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...check import FLOATS, Case, every_layout

# batch, width, heads, channels of a head, ranks, rotary pairs or 0
SHAPES = ((1, 48, 2, 16, 8, 12, 8), (3, 600, 3, 40, 5, 18, 0), (2, 64, 9, 128, 33, 16, 64))


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes and layouts; rows lie in tensors of several tokens, as in a cache."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        for dtype in FLOATS:
            yield Case(f"{shape} {dtype}", draw(*shape, dtype, generator))
    arguments = draw(*SHAPES[0], torch.float32, generator)
    for place in (0, 1, 2, 3):
        for layout, laid in every_layout(arguments[place]):
            yield Case(f"argument {place} {layout}", (*arguments[:place], laid, *arguments[place + 1 :]))


def draw(
    batch: int,
    width: int,
    heads: int,
    head_dim: int,
    rank_k: int,
    rank_v: int,
    pairs: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Any, ...]:
    """Return the operator's arguments; what is written is full of NaN before."""

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    def row(*size: int) -> Tensor:
        return torch.full((batch, 5, *size), torch.nan, dtype=dtype)[:, 3]

    return (
        randn(batch, width),
        randn(rank_k + rank_v, width),
        randn(batch, heads, head_dim),
        randn(batch, heads, head_dim),
        row(rank_k),
        row(rank_v),
        row(heads, head_dim),
        row(heads, head_dim),
        *((randn(batch, pairs), randn(batch, pairs), row(pairs), row(pairs)) if pairs else (None,) * 4),
    )
