"""Cosine of each token with its predecessor, without a gathered copy."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...registry import define
from . import reference

__all__ = ["framefusion_adjacent_cosine"]


def _fake(hidden: Tensor, prev: Tensor) -> Tensor:
    return hidden.new_empty(prev.shape, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)


_operator = define(reference.framefusion_adjacent_cosine, _fake)


def framefusion_adjacent_cosine(hidden: Tensor, prev: Tensor) -> Tensor:
    """Return the cosine of hidden[b, i] and hidden[b, prev[b, i]] (FrameFusion, arXiv 2501.01986, section 4.1).

    Args:
        hidden: (batch, tokens, channels), float16, bfloat16, float32 or float64, any strides.
        prev: (batch, tokens) int64, each below `tokens`; negative where there is no predecessor.

    Returns:
        (batch, tokens) float32 (float64 for float64), -2 where `prev` is negative, 0 where one of the two rows is zero.
        The sums are float32. No gradient flows.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes. Indices are not range-checked on a GPU.
    """
    require_tensor("hidden", hidden, 3, FLOATS)
    require_tensor("prev", prev, 2, (torch.int64,))
    shape = tuple(hidden.shape[:2])
    require(tuple(prev.shape) == shape, "shape of prev", tuple(prev.shape), f"{shape}, batch and tokens of hidden")
    require(prev.device == hidden.device, "device of prev", prev.device, str(hidden.device))
    return _operator(hidden.detach(), prev)
