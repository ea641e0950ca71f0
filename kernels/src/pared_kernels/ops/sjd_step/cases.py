"""Small inputs on which `sjd_step` is checked."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...check import FLOATS, Case, every_layout

# batch, window, columns
SHAPES = ((1, 1, 5), (2, 4, 37), (3, 7, 2500), (1, 3, 17000), (2, 0, 130))


def compare(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """Tokens and lengths must be equal, and the distributions within 1e-6."""
    for name, ours, theirs in zip(("tokens", "committed"), actual[:2], expected[:2], strict=True):
        if not ours.equal(theirs):
            return f"{name} {ours.tolist()}, expected {theirs.tolist()}"
    error = float((actual[2].double() - expected[2]).abs().max()) if actual[2].numel() else 0.0
    return None if error <= 1e-6 else f"probabilities are off by {error:.2e}"


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes and layouts, both rules, with thresholds, forced columns and limits."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        for dtype in FLOATS:
            arguments = made(*shape, dtype, generator)
            for maximal in (True, False):
                yield Case(f"{shape} {dtype} maximal={maximal}", (*arguments, 0.8, maximal), compare)
        if shape == SHAPES[1]:
            logits, *rest = made(*shape, torch.bfloat16, generator)
            for layout, laid in every_layout(logits):
                yield Case(f"{shape} {layout}", (laid, *rest, 1.3, False), compare)


def made(batch: int, window: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """Arguments in which drafts come from the pass before, are certain, or uniform; some are not valid."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    logits = (2 * torch.randn(batch, window + 1, columns, generator=generator)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    near = logits[:, :window].to(wide) + 0.5 * torch.randn(batch, window, columns, generator=generator)
    previous = near.softmax(-1)
    source = torch.arange(window).repeat(batch, 1)
    source[uniform(batch, window) < 0.2] = -1
    source[uniform(batch, window) < 0.1] = -2
    drafts = previous.flatten(0, 1).multinomial(1, generator=generator).view(batch, window) if window else source
    forced = torch.full((batch, window + 1), -1)
    forced[uniform(batch, window + 1) < 0.1] = 3
    threshold = logits.float().topk(min(columns, 40), -1).values[..., -1] if columns > 5 else None
    valid = uniform(batch, window) < 0.95
    limit = torch.randint(1, window + 2, (batch,), generator=generator)
    return (
        logits, drafts, previous, source, uniform(batch, window), uniform(batch, window + 1).double(), threshold,
        forced, valid, limit,
    )  # fmt: skip
