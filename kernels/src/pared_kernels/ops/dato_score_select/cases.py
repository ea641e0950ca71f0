"""Small inputs on which `dato_score_select` is checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...check import FLOATS, Case, Compare, every_layout
from .philox import noise
from .reference import dynamics

# batch, channels, (H, W), grid, patch, groups
SHAPES = (
    (1, 1, (2, 3), (2, 3), (2, 2), 1),
    (4, 4, (9, 11), (9, 11), (2, 3), 2),
    (3, 4, (8, 12), (4, 6), (2, 2), 3),
)


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes and layouts, with and without score, noise and normalisation."""
    generator = torch.Generator().manual_seed(seed)
    for batch, channels, size, grid, patch, groups in SHAPES:
        for dtype in FLOATS:
            current, previous = torch.randn(2, batch, channels, *size, generator=generator).to(dtype)
            for layout, laid in every_layout(current):
                # The interpreter takes long over the noise, which does not depend on the layout.
                weights = (1.0, 0.1, True) if layout == "contiguous" else (-0.5, 0.0, False)
                arguments = (laid, previous, *grid, *patch, *weights, 2**40 + seed, 7, 3, groups)
                yield Case(f"{size} {dtype} {layout} gamma {weights[0]}", arguments, comparer(arguments))
            if dtype != torch.float32:
                continue
            arguments = (current, None, *grid, *patch, 1.0, 0.1, True, seed, 0, 0, groups)
            # Without a score the choice rests on integers alone: no difference is allowed.
            yield Case(f"{size} {dtype} noise alone", arguments)


def comparer(arguments: tuple[Any, ...]) -> Compare:
    """Return a comparison that lets another token of the patch win only where its score is the same up to rounding."""

    def compare(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
        score = scores(*arguments)
        gap = float((score.gather(1, expected[0]) - score.gather(1, actual[0])).abs().max())
        return None if gap <= 1e-5 else f"a token is wrong: its score is {gap:.3e} below the largest of its patch"

    return compare


def scores(
    current: Tensor,
    previous: Tensor,
    grid_height: int,
    grid_width: int,
    patch_height: int,
    patch_width: int,
    gamma: float,
    alpha: float,
    normalize: bool,
    seed: int,
    call: int,
    block: int,
    groups: int,
) -> Tensor:
    """Return the float64 scores (batch, tokens) that `dato_score_select` compares."""
    deciding = current.shape[0] // groups
    change = dynamics(current[:deciding].double(), previous[:deciding].double(), grid_height, grid_width)
    if normalize:
        change = change / change.mean(dim=1, keepdim=True)
    drawn = noise(deciding, change.shape[1], seed, call, block, change.device).double()
    return (gamma * change + alpha * drawn).repeat(groups, 1)
