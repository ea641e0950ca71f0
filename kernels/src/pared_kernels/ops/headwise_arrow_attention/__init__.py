"""Attention whose heads are full, banded with whole text stripes, or skipped, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...registry import define
from . import reference
from .geometry import FULL, SKIP

__all__ = ["headwise_arrow_attention"]


def _fake(*arguments: object) -> None:
    return None


_operator = define(reference.headwise_arrow_attention, _fake, mutates=["out"])


def headwise_arrow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor | Sequence[int],
    num_text: int,
    text_first: bool = False,
    *,
    block: tuple[int, int] | None = (128, 64),
    text_valid: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend with one pattern per head (DiTFastAttnV2, arXiv 2503.22796, sections 3.1 and 3.7 of the method).

    A query and a key of the picture meet if they are at most `windows[head]` tokens apart; text meets everything. Cost
    is proportional to the visited blocks, and skipped heads cost nothing.

    Args:
        q, k, v: (B, S, H, D), one dtype of float16, bfloat16, float32 or float64, any strides.
        windows: H integers: -1 attends to everything, 0 skips the head, above 0 is the half width of the band. On the
            CPU or as a list nothing waits for a GPU.
        num_text: text tokens T, before the S - T vision tokens if `text_first`, else behind them.
        block: rows and columns, powers of two from 16 to 256; a block is computed whole if the pattern touches it.
            None: exactly the pattern.
        text_valid: (B,) integers, how many of the text tokens are attended to; the others are padding. None: all.
        scale: factor of the scores, above 0; None for D ** -0.5.
        out: (B, S, H, D), contiguous, written in place; skipped heads keep what it holds. None: new, zero there.

    Returns:
        `out`. Softmax and sums in float32 or better. No gradients.

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes, windows, blocks or numbers of text tokens.
    """
    require_tensor("q", q, 4, FLOATS)
    for name, value in (("k", k), ("v", v), ("out", out)):
        if value is not None:
            require_tensor(name, value, 4, (q.dtype,))
            require(value.shape == q.shape, f"shape of {name}", tuple(value.shape), f"{tuple(q.shape)}, as of q")
    batch, tokens, heads, head_dim = q.shape
    require(min(q.shape) > 0, "shape of q", tuple(q.shape), "none of its sizes 0")
    per_head = windows.tolist() if isinstance(windows, Tensor) else [int(one) for one in windows]
    require(len(per_head) == heads, "number of windows", len(per_head), f"{heads}, one a head")
    require(min(per_head) >= FULL, "windows", per_head, "-1 (full), 0 (skip) or a half width")
    require(0 <= num_text < tokens, "num_text", num_text, f"0 to {tokens - 1}")
    if block is not None:
        sizes = (16, 32, 64, 128, 256)
        require(len(block) == 2 and all(one in sizes for one in block), "block", block, f"two of {sizes}, or None")
    if text_valid is not None:
        require_tensor("text_valid", text_valid, 1, (torch.int32, torch.int64))
        require(len(text_valid) == batch, "length of text_valid", len(text_valid), f"{batch}, the batch size")
    scale = head_dim**-0.5 if scale is None else scale
    require(scale > 0, "scale", scale, "above 0")
    if out is None:
        new = torch.zeros if SKIP in per_head else torch.empty
        out = new(q.shape, dtype=q.dtype, device=q.device)
    require(out.is_contiguous(), "strides of out", out.stride(), "contiguous")
    if any(per_head):
        q, k, v = (one.detach() for one in (q, k, v))
        rows, columns = block or (0, 0)
        _operator(q, k, v, out, per_head, num_text, text_first, rows, columns, text_valid, scale)
    return out
