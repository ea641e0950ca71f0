"""Acceptance and resampling of speculative Jacobi decoding: from logits to tokens, without sorting or host reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...registry import define
from . import reference

__all__ = ["sjd_step"]


def _fake(
    logits: Tensor,
    drafts: Tensor,
    previous: Tensor,
    source: Tensor,
    u_accept: Tensor,
    u_sample: Tensor,
    threshold: Tensor | None,
    forced: Tensor,
    valid: Tensor,
    limit: Tensor,
    temperature: float,
    maximal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, width = logits.shape[:2]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty((batch, width), dtype=torch.int64),
        logits.new_empty(batch, dtype=torch.int64),
        logits.new_empty(logits.shape, dtype=wide),
    )


_operator = define(reference.sjd_step, _fake)


def sjd_step(
    logits: Tensor,
    drafts: Tensor,
    previous: Tensor,
    source: Tensor,
    u_accept: Tensor,
    u_sample: Tensor,
    *,
    threshold: Tensor | None = None,
    forced: Tensor | None = None,
    valid: Tensor | None = None,
    limit: Tensor | None = None,
    temperature: float = 1.0,
    maximal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, committed lengths and distributions of a window (arXiv 2410.01699, section 3.2).

    p is the softmax of logits / temperature over the columns whose logit is at least `threshold`. Draft k is accepted
    if u q < p; otherwise its token is drawn from max(0, p - q), or from p where that is zero everywhere. With `maximal`
    this happens at every position (arXiv 2510.24211), without at the first rejection alone, and everything behind it is
    drawn from p.

    Args:
        logits: (batch, window + 1, columns), float16, bfloat16, float32 or float64, the last dimension contiguous.
        drafts: (batch, window) int64 columns.
        previous: (batch, rows, columns) float32 (float64 for float64), the distributions of the pass before.
        source: (batch, window) int64, the row of `previous` that a draft was drawn from; -1 for a draft that is
            certain, -2 for one drawn uniformly from all columns.
        u_accept, u_sample: (batch, window) and (batch, window + 1) float32 or float64 in [0, 1).
        threshold: (batch, window + 1) float32; forced: (batch, window + 1) int64, columns that are certain, or -1.
        valid: (batch, window) bool, drafts that may be tested; the others end the accepted ones, and are drawn from p.
        limit: (batch,) int64, the largest committed length.
        temperature: above 0.

    Returns:
        tokens (batch, window + 1) int64, committed (batch,) int64, p (batch, window + 1, columns) float32 (float64 for
        float64). The first `committed` tokens are final; the others are the next drafts, and p is what they were drawn
        from.

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes or values. Columns and rows are not range-checked on a GPU.
    """
    require_tensor("logits", logits, 3, FLOATS)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    batch, width, columns = logits.shape
    require(width >= 1, "positions of logits", width, "at least 1")
    require_tensor("previous", previous, 3, (wide,))
    fits = previous.shape[0] == batch and previous.shape[2] == columns
    require(fits, "shape of previous", tuple(previous.shape), f"({batch}, rows, {columns})")
    for name, one, shape, dtypes in (
        ("drafts", drafts, (batch, width - 1), (torch.int64,)),
        ("source", source, (batch, width - 1), (torch.int64,)),
        ("u_accept", u_accept, (batch, width - 1), (torch.float32, torch.float64)),
        ("u_sample", u_sample, (batch, width), (torch.float32, torch.float64)),
        ("threshold", threshold, (batch, width), (torch.float32, torch.float64)),
        ("forced", forced, (batch, width), (torch.int64,)),
        ("valid", valid, (batch, width - 1), (torch.bool,)),
        ("limit", limit, (batch,), (torch.int64,)),
    ):
        if one is not None:
            require_tensor(name, one, len(shape), dtypes)
            require(tuple(one.shape) == shape, f"shape of {name}", tuple(one.shape), str(shape))
            require(one.device == logits.device, f"device of {name}", one.device, str(logits.device))
    require(temperature > 0, "temperature", temperature, "above 0")
    if forced is None:
        forced = torch.full((batch, width), -1, dtype=torch.int64, device=logits.device)
    if valid is None:
        valid = torch.ones(batch, width - 1, dtype=torch.bool, device=logits.device)
    if limit is None:
        limit = torch.full((batch,), width, dtype=torch.int64, device=logits.device)
    return _operator(
        logits.detach(), drafts, previous, source, u_accept, u_sample, threshold, forced, valid, limit,
        float(temperature), maximal,
    )  # fmt: skip
