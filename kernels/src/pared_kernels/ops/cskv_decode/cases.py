"""Small inputs on which `cskv_decode` is checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...check import Case, every_layout

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest error relative to the scale of the output; keys are rounded to the dtype after they were rebuilt."""

HALVES = (torch.bfloat16, torch.float16)
"""Taken in turns by the shapes: the interpreter is slow."""


class Shape(NamedTuple):
    """Sizes of one case; `turned` of the `dim` channels are rotated, `quantised` old tokens are codes of `bits`."""

    batch: int = 1
    heads: int = 1
    group: int = 1
    dim: int = 64
    turned: int = 64
    rank_k: int = 16
    rank_v: int = 16
    old: int = 0
    recent: int = 0
    padded: bool = False
    biased: bool = False
    quantised: int = 0
    bits: int = 4
    clamped: bool = False


SHAPES = (
    Shape(heads=2, group=2, old=37, recent=5),
    Shape(heads=1, group=1, recent=33),
    Shape(heads=3, group=8, rank_k=20, rank_v=37, old=100, padded=True, biased=True),
    Shape(batch=2, heads=2, group=4, dim=128, turned=128, rank_k=205, rank_v=200, old=70, recent=33, padded=True),
    Shape(batch=2, heads=4, group=1, dim=64, turned=32, rank_k=48, rank_v=16, old=64, recent=1, biased=True),
    Shape(heads=1, group=20, dim=80, turned=0, rank_k=16, rank_v=33, old=70, recent=40),
    Shape(batch=2, heads=2, group=2, rank_k=40, rank_v=20, old=70, recent=9, padded=True, quantised=64),
    Shape(heads=2, group=2, rank_k=33, rank_v=18, old=90, recent=3, quantised=90, bits=2, clamped=True),
)
LARGE = (
    Shape(heads=1, group=4, dim=128, turned=128, rank_k=512, rank_v=512, old=300, recent=33, padded=True),
    Shape(heads=2, group=1, rank_k=16, rank_v=24, old=5000, recent=2),
    Shape(heads=1, group=2, rank_k=24, rank_v=16, old=2000, recent=33, quantised=1984, bits=8),
)
"""Run in one dtype alone."""


def cases(seed: int) -> Iterator[Case]:
    """Yield cases over shapes, dtypes and layouts: no old or no recent token, padding, biases, quantised latents."""
    generator = torch.Generator().manual_seed(seed)
    for place, shape in enumerate(SHAPES):
        for dtype in (torch.float32, HALVES[place % 2], torch.float64):
            arguments = draw(shape, dtype, generator)
            yield Case(f"{shape} {dtype}", arguments, tolerance=TOLERANCES[dtype])
    for place, shape in enumerate(LARGE):
        dtype = HALVES[place % 2]
        arguments = draw(shape, dtype, generator)
        yield Case(f"{shape} {dtype}", arguments, tolerance=TOLERANCES[dtype])
    arguments = draw(SHAPES[0], torch.float32, generator)
    for place in (0, 1, 5, 7):
        for layout, laid in every_layout(arguments[place]):
            given = (*arguments[:place], laid, *arguments[place + 1 :])
            yield Case(f"argument {place} {layout}", given, tolerance=TOLERANCES[torch.float32])


def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator, device: str = "cpu") -> tuple[Any, ...]:
    """Return the operator's arguments; the first of several padded rows begins behind the old tokens if it can."""

    def randn(*size: int, spread: float = 1.0) -> Tensor:
        return (spread * torch.randn(*size, generator=generator)).to(dtype)

    batch, heads, dim, old = shape.batch, shape.heads, shape.dim, shape.old
    width = heads * dim
    angles = 6 * torch.rand(batch, old, shape.turned // 2, generator=generator)
    start = None
    if shape.padded:
        start = torch.randint(1, old // 2 + 1, (batch,), generator=generator)
        if batch > 1:
            start[0] = old + min(1, max(shape.recent - 1, 0)) if shape.recent else old - 1
    k_parts: tuple[Any, ...] = (None, None, None)
    v_parts: tuple[Any, ...] = (None, None, None)
    k_group, v_group, quantised = 1, 1, shape.quantised
    if quantised:
        k_group, v_group = 32, max(one for one in range(1, shape.rank_v) if shape.rank_v % one == 0)
        rows = (batch, -(-quantised // k_group), shape.rank_k), (batch, quantised, shape.rank_v // v_group)
        k_parts, v_parts = (
            _codes(batch, quantised, rank, shape, size, generator)
            for rank, size in zip((shape.rank_k, shape.rank_v), rows, strict=True)
        )
    return (
        randn(batch, heads * shape.group, 1, dim),
        randn(batch, old - quantised, shape.rank_k),
        randn(batch, old - quantised, shape.rank_v),
        randn(width, shape.rank_k, spread=shape.rank_k**-0.5),
        randn(width, shape.rank_v, spread=shape.rank_v**-0.5),
        randn(batch, heads, shape.recent, dim),
        randn(batch, heads, shape.recent, dim),
        angles.cos().to(dtype) if shape.turned else None,
        angles.sin().to(dtype) if shape.turned else None,
        dim**-0.5,
        start,
        randn(width) if shape.biased else None,
        randn(width) if shape.biased else None,
        *k_parts,
        *v_parts,
        shape.bits if quantised else 0,
        shape.bits if quantised else 0,
        k_group,
        v_group,
        shape.clamped,
    )


def _codes(
    batch: int, tokens: int, rank: int, shape: Shape, groups: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    levels = 2**shape.bits - 1
    codes = torch.randint(0, 256, (batch, tokens, -(-rank * shape.bits // 8)), generator=generator, dtype=torch.uint8)
    scale = ((1 + torch.rand(groups, generator=generator)) * 2 / levels).half()
    offset = torch.randint(0, levels + 1, groups, generator=generator).half()
    return codes, scale, offset if shape.clamped else (-1.5 + 0.5 * offset / levels).half()
