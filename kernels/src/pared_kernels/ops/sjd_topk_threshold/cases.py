"""Small inputs on which `sjd_topk_threshold` is checked."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...check import FLOATS, Case, every_layout

# rows, columns, k
SHAPES = ((1, 1, 1), (3, 37, 5), (2, 5000, 2000), (2, 4096, 4096))


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes and layouts; with ties, both zeros, infinities and tiny numbers."""
    generator = torch.Generator().manual_seed(seed)
    for rows, columns, k in SHAPES:
        for dtype in FLOATS:
            logits = (3 * torch.randn(rows, columns, generator=generator)).to(dtype)
            yield Case(f"{rows}x{columns} k={k} {dtype}", (logits, k))
            if columns == 37:
                for layout, laid in every_layout(logits):
                    yield Case(f"{layout} {dtype}", (laid, k))
                odd = logits.clone()
                odd[:, :9] = torch.tensor([0.0, -0.0, 1.5, 1.5, -1.5, -torch.inf, 1e-5, -1e-5, 2.0]).to(dtype)
                for which in (1, 2, 3, 20, 36):
                    yield Case(f"ties k={which} {dtype}", (odd, which))
