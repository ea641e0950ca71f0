"""Small inputs on which `dato_norm_gather` is checked."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...check import FLOATS, Case, every_layout

# batch, tokens, channels, kept
SHAPES = ((1, 5, 3, 1), (2, 33, 40, 17), (2, 9, 320, 9))


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes, layouts, and with or without weight and bias; tokens may repeat."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        batch, tokens, channels, kept = shape
        for dtype in FLOATS:
            x = (torch.randn(batch, tokens, channels, generator=generator) * 3 + 1).to(dtype)
            index = torch.randint(tokens, (batch, 2 * kept), generator=generator)[:, ::2]
            weight, bias = torch.randn(2, channels, generator=generator).to(dtype)
            for layout, laid in every_layout(x):
                if layout == "contiguous" or shape == SHAPES[1]:
                    yield Case(f"{shape} {dtype} {layout}", (laid, index, weight, bias, 1e-5))
            yield Case(f"{shape} {dtype} no weight, no bias", (x, index, None, None, 1e-6))
