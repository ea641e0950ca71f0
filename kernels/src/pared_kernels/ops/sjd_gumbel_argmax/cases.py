"""Small inputs on which `sjd_gumbel_argmax` is checked."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...check import FLOATS, Case, every_layout

# batch, positions, columns, first token
SHAPES = ((1, 1, 1, 0), (2, 3, 37, 0), (2, 2, 130, 5), (1, 2, 2100, 4))


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes and layouts; some tokens are impossible."""
    generator = torch.Generator().manual_seed(seed)
    for batch, width, columns, first in SHAPES:
        for dtype in FLOATS:
            probs = torch.rand(batch, width, columns, generator=generator)
            probs[torch.rand(probs.shape, generator=generator) < 0.2] = 0
            probs[..., 0] = 0.5
            probs = probs.to(dtype)
            rows = torch.randint(0, 2**20, (batch,), generator=generator)
            positions = torch.randint(0, 2**20, (batch, width), generator=generator)
            rest = (rows, positions, 0x9E3779B9, 0xFFFFFFFF, 3, first)
            yield Case(f"{batch}x{width}x{columns} {dtype}", (probs, *rest))
            if columns == 37:
                for layout, laid in every_layout(probs):
                    yield Case(f"{layout} {dtype}", (laid, *rest))
