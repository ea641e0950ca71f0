"""Small inputs on which `framefusion_adjacent_cosine` is checked."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...check import FLOATS, Case, every_layout

# batch, tokens, channels
SHAPES = ((1, 1, 8), (2, 37, 40), (1, 9, 4104))


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes and layouts; some tokens have no predecessor, one is zero, some are equal."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        batch, tokens, _ = shape
        for dtype in FLOATS:
            hidden = torch.randn(shape, generator=generator)
            prev = _earlier(batch, tokens, generator)
            if tokens > 8:
                hidden[:, 5] = hidden[:, 3]
                hidden[0, 7] = 0.0
                prev[:, 5], prev[0, 7], prev[0, 8] = 3, 4, 7
            hidden = hidden.to(dtype)
            for layout, laid in every_layout(hidden):
                if layout == "contiguous" or shape == SHAPES[1]:
                    yield Case(f"{shape} {dtype} {layout}", (laid, prev), tolerance=1e-5)


def _earlier(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    place = torch.arange(tokens)
    chosen = (torch.rand(batch, tokens, generator=generator) * place).long()
    lonely = torch.rand(batch, tokens, generator=generator) < 0.2
    lonely[:, 0] = True
    return chosen.masked_fill(lonely, -1)
