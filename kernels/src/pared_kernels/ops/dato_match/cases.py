"""Small inputs on which `best_match` is checked."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...check import FLOATS, Case, Compare, every_layout

# batch, tokens, channels, queries, keys
SHAPES = ((1, 5, 3, 2, 1), (2, 75, 40, 51, 20), (1, 210, 20, 70, 140))


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes and layouts; one token has zero norm, another appears twice among the keys."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        for dtype in FLOATS:
            metric, query_idx, key_idx = draw(*shape, dtype, generator)
            for layout, laid in every_layout(metric):
                if layout == "contiguous" or shape == SHAPES[1]:
                    yield Case(
                        f"{shape} {dtype} {layout}", (laid, query_idx, key_idx), _comparer(metric, query_idx, key_idx)
                    )


def draw(
    batch: int, tokens: int, channels: int, queries: int, keys: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return metric, disjoint query_idx and key_idx (not contiguous)."""
    metric = torch.randn(batch, tokens, channels, generator=generator).to(dtype)
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    query_idx, key_idx = order[:, :queries], order[:, queries : queries + keys]
    if queries > 1:
        metric[torch.arange(batch), query_idx[:, 1]] = 0
    if keys > 2:
        metric[torch.arange(batch), key_idx[:, -1]] = metric[torch.arange(batch), key_idx[:, 1]]
    return metric, query_idx, key_idx


def _comparer(metric: Tensor, query_idx: Tensor, key_idx: Tensor) -> Compare:
    limit = 1e-12 if metric.dtype == torch.float64 else 1e-6

    def compare(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
        similarity, position = actual
        error = float((similarity.double() - expected[0]).abs().max())
        if not error <= limit:
            return f"similarity is off by {error:.3e} (limit {limit:.0e})"
        # Another key may win only where its cosine is the same up to rounding.
        direction = torch.nn.functional.normalize(metric.double(), dim=-1)
        samples = torch.arange(metric.shape[0])[:, None]
        chosen = direction[samples, key_idx.gather(1, position)]
        reached = (direction[samples, query_idx] * chosen).sum(-1)
        gap = float((expected[0] - reached).abs().max())
        return None if gap <= limit else f"a position is wrong: its cosine is {gap:.3e} below the largest"

    return compare
