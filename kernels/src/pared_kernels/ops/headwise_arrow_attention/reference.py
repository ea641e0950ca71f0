"""The meaning of headwise arrow attention in plain torch: one masked softmax per head."""

from __future__ import annotations

from torch import Tensor, arange, float32, float64, inf

from .geometry import SKIP, Arrow, block_map


def headwise_arrow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    windows: list[int],
    num_text: int,
    text_first: bool,
    block_rows: int,
    block_columns: int,
    text_valid: Tensor | None,
    scale: float,
) -> None:
    """Write what `pared_kernels.headwise_arrow_attention` writes; block sizes of 0 mean the exact mask."""
    work = float64 if q.dtype == float64 else float32
    tokens = q.shape[1]
    position = arange(tokens, device=q.device)
    for head, window in enumerate(windows):
        if window == SKIP:
            continue
        arrow = Arrow(tokens - num_text, num_text, window, text_first)
        keep = arrow.keeps(position, position)
        if block_rows:
            blocks = block_map(arrow, (block_rows, block_columns)).to(q.device)
            keep = blocks[(position // block_rows)[:, None], (position // block_columns)[None, :]]
        keep = keep.expand(len(q), tokens, tokens)
        if text_valid is not None:
            is_text = (position >= arrow.text.start) & (position < arrow.text.stop)
            padding = is_text & (position - arrow.text.start >= text_valid[:, None])
            keep = keep & ~padding[:, None, :]
        query, key, value = (one[:, :, head].to(work) for one in (q, k, v))
        scores = (query @ key.transpose(1, 2) * scale).masked_fill(~keep, -inf)
        out[:, :, head] = (scores.softmax(dim=-1) @ value).to(out.dtype)
