"""Small inputs on which `cskv_quant_flush` is checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...check import FLOATS, Case, Compare, every_layout
from ..cskv_decode.reference import dequantized

# batch, tokens, channels, bits, group, per token, clamped
SHAPES = (
    (2, 64, 40, 4, 32, False, False),
    (1, 24, 33, 2, 8, False, True),
    (2, 7, 50, 4, 25, True, False),
    (1, 5, 33, 8, 11, True, True),
    (1, 32, 18, 2, 9, True, False),
    (1, 48, 5, 8, 24, False, False),
)


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over groupings, bits, dtypes and layouts; groups of one sign and of one value are among them."""
    generator = torch.Generator().manual_seed(seed)
    for shape in SHAPES:
        for dtype in FLOATS:
            arguments = draw(*shape, dtype, generator)
            yield Case(f"{shape} {dtype}", arguments, compare=_comparer(arguments))
    arguments = draw(*SHAPES[0], torch.float32, generator)
    for layout, laid in every_layout(arguments[0]):
        yield Case(layout, (laid, *arguments[1:]), compare=_comparer(arguments))


def draw(
    batch: int,
    tokens: int,
    channels: int,
    bits: int,
    group: int,
    per_token: bool,
    clamped: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Any, ...]:
    """Return the operator's arguments; what is written lies in tensors of more tokens, as in a cache."""
    latents = torch.randn(batch, tokens, channels, generator=generator) + torch.linspace(-3, 3, channels)
    latents[:, :, 0] = 0.25
    rows = (tokens, channels // group) if per_token else (tokens // group, channels)
    codes = torch.full((batch, tokens + 3, -(-channels * bits // 8)), 170, dtype=torch.uint8)[:, 2:-1]
    scale, offset = (torch.full((batch, rows[0] + 3, rows[1]), torch.nan).half()[:, 2:-1] for _ in range(2))
    return latents.to(dtype), codes, scale, offset, bits, group, per_token, clamped


def _comparer(arguments: tuple[Any, ...]) -> Compare:
    """Where a value lies half-way between two codes, rounding decides: another code must be as near to it."""
    latents, _, _, _, bits, group, per_token, clamped = arguments

    def compare(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
        for name, ours, theirs in zip(("scale", "offset"), actual[1:], expected[1:], strict=True):
            error = float((ours.double() - theirs).abs().max())
            if not error <= 2**-10 * max(float(theirs.abs().max()), 1e-3):
                return f"{name} is off by {error:.3e}"
        scale, offset = (one.repeat_interleave(group, dim=2 if per_token else 1) for one in expected[1:])
        ours, theirs = (
            (dequantized(codes, scale, offset, latents.shape[2], bits, clamped, torch.float64) - latents).abs() / scale
            for codes in (actual[0], expected[0])
        )
        worst = float((ours - theirs).max())
        return None if worst <= 1e-3 else f"a code is {worst:.3f} steps farther from its value than the nearest"

    return compare
