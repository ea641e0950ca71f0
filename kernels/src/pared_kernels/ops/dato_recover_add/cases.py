"""Small inputs on which `dato_recover_add` is checked."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...check import FLOATS, Case, every_layout

# batch, tokens, channels, kept
SHAPES = ((1, 5, 3, 1), (2, 33, 40, 17), (1, 7, 1100, 3))


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes, layouts, and with or without a gate."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        batch, tokens, channels, kept = shape
        for dtype in FLOATS:
            x = torch.randn(batch, tokens, channels, generator=generator).to(dtype)
            y = torch.randn(batch, kept, channels, generator=generator).to(dtype)
            gather_map = torch.randint(kept, (batch, 2 * tokens), generator=generator)[:, ::2]
            gate = torch.randn(batch, channels, generator=generator).to(dtype)
            layouts = zip(every_layout(x), every_layout(y), strict=True)
            for (layout, laid_x), (_, laid_y) in layouts:
                if layout == "contiguous" or shape == SHAPES[1]:
                    yield Case(f"{shape} {dtype} {layout}", (laid_x, laid_y, gather_map, gate))
            yield Case(f"{shape} {dtype} no gate", (x, y, gather_map, None))
