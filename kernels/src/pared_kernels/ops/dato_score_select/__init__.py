"""Base tokens of DaTo: change of the prediction, normalisation, noise and argmax per patch, in one launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...registry import define
from . import reference

__all__ = ["dato_score_select"]


def _fake(
    current: Tensor,
    previous: Tensor | None,
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
    patches = (grid_height // patch_height) * (grid_width // patch_width)
    return current.new_empty((current.shape[0], patches), dtype=torch.int64)


_operator = define(reference.dato_score_select, _fake)


def dato_score_select(
    current: Tensor,
    previous: Tensor | None,
    *,
    grid: tuple[int, int] | None = None,
    patch: tuple[int, int] = (2, 2),
    gamma: float = 1.0,
    alpha: float = 0.1,
    normalize: bool = True,
    seed: int = 0,
    call: int = 0,
    block: int = 0,
    cfg_groups: int = 1,
) -> Tensor:
    """Return the token of largest score in each patch (DaTo, arXiv 2501.00375, sections 3.2 and 3.3).

    The score is gamma * D + alpha * z. D is the mean over channels of |current - previous|, averaged over the pixels of
    a token, 0 where not finite, and divided by its mean over the tokens of the sample if `normalize`. z is noise of
    mean 0 and variance 1 that depends on (seed, call, block, sample, token) alone and is the same bits with every
    backend: the standardised sum of 16 uniform 16-bit integers from Philox4x32-10, normal but for an excess kurtosis of
    -0.075 and a range of +-6.9.

    Args:
        current: (batch, channels, H, W), float16, bfloat16, float32 or float64; the newest prediction.
        previous: the prediction before, like `current`, or None for a score of noise alone.
        grid: (h, w) of the tokens; h divides H and w divides W. None: (H, W).
        patch: (height, width) in tokens, at most the grid. Tokens that fill no patch are never chosen.
        gamma, alpha: finite weights; a negative gamma prefers the least change, alpha 0 draws no noise.
        seed: in [0, 2**63). call, block: in [0, 2**31).
        cfg_groups: with g > 1, sample b uses the score of sample b mod (batch / g), so that the halves of a guided
            batch choose alike; ignored when g does not divide the batch.

    Returns:
        (batch, (h // patch height) * (w // patch width)) int64 flat token indices, patches in row-major order, equal
        scores to the first token of the patch. No gradient flows.

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes or values.
    """
    require_tensor("current", current, 4, FLOATS)
    batch, _, height, width = current.shape
    if previous is not None:
        require_tensor("previous", previous, 4, (current.dtype,))
        shape = tuple(current.shape)
        require(previous.shape == current.shape, "shape of previous", tuple(previous.shape), f"{shape}, as current")
        previous = previous.detach()
    h, w = (height, width) if grid is None else grid
    fits = h > 0 and w > 0 and height % h == 0 and width % w == 0
    require(fits, "grid", grid, f"(h, w) that divide ({height}, {width})")
    inside = 1 <= patch[0] <= h and 1 <= patch[1] <= w
    require(inside, "patch", patch, f"(height, width) from (1, 1) to the grid ({h}, {w})")
    require(abs(gamma) < math.inf, "gamma", gamma, "a finite number")
    require(abs(alpha) < math.inf, "alpha", alpha, "a finite number")
    require(0 <= seed < 2**63, "seed", seed, "0 <= seed < 2**63")
    require(0 <= call < 2**31, "call", call, "0 <= call < 2**31")
    require(0 <= block < 2**31, "block", block, "0 <= block < 2**31")
    require(cfg_groups >= 1, "cfg_groups", cfg_groups, ">= 1")
    groups = cfg_groups if batch % cfg_groups == 0 else 1
    return _operator(
        current.detach(), previous, h, w, patch[0], patch[1], gamma, alpha, normalize, seed, call, block, groups
    )
