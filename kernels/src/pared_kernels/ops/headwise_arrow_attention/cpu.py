"""Headwise arrow attention with torch's own attention on the keys that each row block visits, and on no other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .geometry import FULL, SKIP, Arrow, visits

ROWS = 128
"""Rows computed at once where the mask is exact."""


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
    """Write what `pared_kernels.headwise_arrow_attention` writes; heads of one window are computed together."""
    tokens = q.shape[1]
    block = (block_rows, block_columns) if block_rows else None
    for window in sorted(set(windows) - {SKIP}):
        heads = [head for head, own in enumerate(windows) if own == window]
        arrow = Arrow(tokens - num_text, num_text, window, text_first)
        for samples, valid in _samples(len(q), num_text, text_valid):
            # (samples, heads, tokens, head_dim), as torch's attention takes it.
            parts = (one[samples].transpose(1, 2) for one in (q, k, v))
            query, key, value = (one if len(heads) == q.shape[2] else one[:, heads] for one in parts)
            for rows, columns, keep in _pieces(arrow, block, valid, q.device):
                near, answers = (_picked(one, columns) for one in (key, value))
                result = scaled_dot_product_attention(query[:, :, rows], near, answers, attn_mask=keep, scale=scale)
                _write(out, samples, rows, heads, result.transpose(1, 2))


def _samples(batch: int, num_text: int, text_valid: Tensor | None) -> Iterator[tuple[slice, int]]:
    """Yield samples that have the same number of valid text tokens, one by one if they differ, and that number."""
    counts = [num_text] * batch if text_valid is None else [int(one) for one in text_valid.tolist()]
    if len(set(counts)) == 1:
        yield slice(0, batch), counts[0]
        return
    for sample, count in enumerate(counts):
        yield slice(sample, sample + 1), count


def _pieces(
    arrow: Arrow, block: tuple[int, int] | None, valid: int, device: torch.device
) -> Iterator[tuple[slice, list[range], Tensor | None]]:
    """Yield rows, the ranges of keys they attend to, and a mask of these pairs where not all are kept."""
    if arrow.window == FULL:
        yield slice(0, arrow.tokens), _without_padding([range(arrow.tokens)], arrow, valid), None
    elif block is None:
        yield from _exact_pieces(arrow, valid, device)
    else:
        number, width = -(-arrow.tokens // block[0]), block[1]
        row = 0
        while row < number:
            here = visits(arrow, row, block)
            first = row
            while row < number and visits(arrow, row, block) == here:
                row += 1
            spans = [range(part.start * width, min(part.stop * width, arrow.tokens)) for part in here]
            rows = slice(first * block[0], min(row * block[0], arrow.tokens))
            yield rows, _without_padding(spans, arrow, valid), None


def _exact_pieces(arrow: Arrow, valid: int, device: torch.device) -> Iterator[tuple[slice, list[range], Tensor | None]]:
    vision = arrow.vision
    if arrow.num_text:
        rows = slice(arrow.text.start, arrow.text.stop)
        yield rows, _without_padding([range(arrow.tokens)], arrow, valid), None
    for first in range(vision.start, vision.stop, ROWS):
        end = min(first + ROWS, vision.stop)
        band = range(max(vision.start, first - arrow.window), min(vision.stop, end + arrow.window))
        columns = _without_padding([band, arrow.text], arrow, valid)
        positions = torch.cat([torch.arange(part.start, part.stop, device=device) for part in columns])
        yield slice(first, end), columns, arrow.keeps(torch.arange(first, end, device=device), positions)


def _without_padding(spans: list[range], arrow: Arrow, valid: int) -> list[range]:
    """Return `spans` in order, joined where they touch, without the text tokens from number `valid` on."""
    padding = range(arrow.text.start + valid, arrow.text.stop)
    cut = []
    for span in spans:
        cut.append(range(span.start, min(span.stop, padding.start)))
        cut.append(range(max(span.start, padding.stop), span.stop))
    joined: list[range] = []
    for span in sorted((one for one in cut if len(one)), key=lambda one: one.start):
        if joined and span.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return joined


def _picked(tokens: Tensor, columns: list[range]) -> Tensor:
    parts = [tokens[:, :, span.start : span.stop] for span in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _write(out: Tensor, samples: slice, rows: slice, heads: list[int], result: Tensor) -> None:
    target = out[samples, rows]
    if len(heads) == out.shape[2]:
        target.copy_(result)
    else:
        target.index_copy_(2, torch.tensor(heads, device=out.device), result.to(out.dtype))
