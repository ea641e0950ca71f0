"""Small inputs on which `framefusion_last_query_scores` is checked."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...check import FLOATS, Case, every_layout

# batch, heads, kv_heads, queries, tokens, head_dim
SHAPES = ((1, 1, 1, 1, 1, 4), (2, 6, 2, 4, 71, 24), (1, 4, 4, 1, 130, 32), (1, 7, 1, 2, 65, 16))


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes, layouts and masks; one row of the batch sees nothing at all."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        batch, heads, kv_heads, queries, tokens, dim = shape
        for dtype in FLOATS:
            query = torch.randn(batch, heads, queries, dim, generator=generator).to(dtype)
            key = torch.randn(batch, kv_heads, tokens, dim, generator=generator).to(dtype)
            scaling = dim**-0.5
            for layout, laid in every_layout(key):
                if layout == "contiguous" or shape == SHAPES[1]:
                    yield Case(f"{shape} {dtype} {layout}", (query, laid, scaling, None), tolerance=1e-5)
            if tokens > 1:
                valid = torch.rand(batch, tokens, generator=generator) < 0.7
                valid[-1] &= batch == 1
                yield Case(f"{shape} {dtype} masked", (query, key, scaling, valid), tolerance=1e-5)
