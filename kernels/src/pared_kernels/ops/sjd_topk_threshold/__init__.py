"""The k-th largest logit of each row, without a sort: what top-k sampling compares with."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...registry import define
from . import reference

__all__ = ["sjd_topk_threshold"]


def _fake(logits: Tensor, k: int) -> Tensor:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[:1], dtype=wide)


_operator = define(reference.sjd_topk_threshold, _fake)


def sjd_topk_threshold(logits: Tensor, k: int) -> Tensor:
    """Return the k-th largest number of each row, exactly; comparing with it keeps ties.

    Args:
        logits: (rows, columns), float16, bfloat16, float32 or float64, without NaN; infinities are fine.
        k: from 1 to columns.

    Returns:
        (rows,) float32 (float64 for float64). No gradient flows.

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes or k.
    """
    require_tensor("logits", logits, 2, FLOATS)
    require(1 <= k <= logits.shape[1], "k", k, f"1 to {logits.shape[1]} (columns of logits)")
    return _operator(logits.detach(), k)
