"""A token for each distribution by noise that belongs to its place: argmax(log p + g), g made in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...philox import WORD
from ...registry import define
from . import reference

__all__ = ["sjd_gumbel_argmax"]


def _fake(
    probs: Tensor, rows: Tensor, positions: Tensor, seed_low: int, seed_high: int, stream: int, first: int
) -> Tensor:
    return probs.new_empty(probs.shape[:2], dtype=torch.int64)


_operator = define(reference.sjd_gumbel_argmax, _fake)


def sjd_gumbel_argmax(
    probs: Tensor, rows: Tensor, positions: Tensor, *, seed: int, stream: int = 0, first: int = 0
) -> Tensor:
    """Return argmax(log p + g) for every position: a draw from p that its place alone decides.

    g is the noise of `pared_kernels.philox.gumbel` for (seed, row, position, token, stream); column v is token
    `first` + v.

    Args:
        probs: (batch, positions, columns), float16, bfloat16, float32 or float64; need not be normalised.
        rows: (batch,) and positions: (batch, positions), int64 in [0, 2**32).
        seed: in [0, 2**64); stream: in [0, 2**32).
        first: a multiple of 4 or not, at least 0.

    Returns:
        (batch, positions) int64 columns; the first of equal ones.

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes or values.
    """
    require_tensor("probs", probs, 3, FLOATS)
    shape = tuple(probs.shape[:2])
    require_tensor("rows", rows, 1, (torch.int64,))
    require(tuple(rows.shape) == shape[:1], "shape of rows", tuple(rows.shape), str(shape[:1]))
    require_tensor("positions", positions, 2, (torch.int64,))
    require(tuple(positions.shape) == shape, "shape of positions", tuple(positions.shape), str(shape))
    require(0 <= seed < 2**64, "seed", seed, "0 <= seed < 2**64")
    require(0 <= stream < 2**32, "stream", stream, "0 <= stream < 2**32")
    require(first >= 0, "first", first, "at least 0")
    return _operator(probs.detach(), rows, positions, seed & WORD, seed >> 32, stream, first)
