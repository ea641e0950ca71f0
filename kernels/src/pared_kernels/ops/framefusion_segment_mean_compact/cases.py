"""Small inputs on which `framefusion_segment_mean_compact` is checked."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...check import FLOATS, Case, every_layout

# batch, tokens, channels
SHAPES = ((1, 3, 5), (2, 41, 40), (1, 12, 2056))


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes, layouts and weights; some segments are empty, some tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        for dtype in FLOATS:
            hidden = (torch.randn(shape, generator=generator) + 1).to(dtype)
            groups = _groups(shape[0], shape[1], generator)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            weight = torch.randint(1, 9, shape[:2], generator=generator).to(wide)
            for layout, laid in every_layout(hidden):
                if layout == "contiguous" or shape == SHAPES[1]:
                    yield Case(f"{shape} {dtype} {layout}", (laid, *groups, None))
            yield Case(f"{shape} {dtype} weighted", (hidden, *groups, weight))


def _groups(batch: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    segments = max(1, tokens // 3)
    order = torch.rand(batch, tokens, generator=generator).argsort(1)
    bounds = torch.randint(0, tokens + 1, (batch, segments + 1), generator=generator).sort(1).values
    bounds[:, 1 : segments // 2] = bounds[:, :1]
    out_index = torch.rand(batch, segments, generator=generator).argsort(1)
    return order, bounds, out_index
