"""The same attention through torch's FlexAttention: a cross-check, and what the kernel is measured against."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pared_kernels.ops.headwise_arrow_attention.geometry import Arrow, block_map
from torch import Tensor

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

TILE = 128
"""Rows and columns of FlexAttention's own blocks."""


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor | Sequence[int],
    num_text: int,
    text_first: bool,
    block: tuple[int, int] | None,
    text_valid: Tensor | None,
    scale: float | None,
    out: Tensor | None,
) -> Tensor:
    """Return what `functional.headwise_arrow_attention` returns; compiled on a GPU, where masks are kept by content."""
    from torch.nn.attention.flex_attention import flex_attention as attend

    per_head = tuple(windows.tolist() if isinstance(windows, Tensor) else [int(one) for one in windows])
    live = [head for head, window in enumerate(per_head) if window != 0]
    if out is None:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    if not live:
        return out
    kept = tuple(per_head[head] for head in live)
    valid = None if text_valid is None else tuple(text_valid.tolist())
    mask = _block_mask(kept, q.shape[1] - num_text, num_text, text_first, block, valid, q.device)
    run = _compiled() if q.device.type == "cuda" else attend
    heads = torch.tensor(live, device=q.device)
    parts = (one.index_select(2, heads).transpose(1, 2) for one in (q, k, v))
    out.index_copy_(2, heads, run(*parts, block_mask=mask, scale=scale).transpose(1, 2))
    return out


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention as attend

    return torch.compile(attend, dynamic=False)


@functools.lru_cache(maxsize=512)
def _block_mask(
    windows: tuple[int, ...],
    num_vision: int,
    num_text: int,
    text_first: bool,
    block: tuple[int, int] | None,
    valid: tuple[int, ...] | None,
    device: torch.device,
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = num_vision + num_text
    rule = _block_rule if block else _exact_rule
    keep = rule(windows, num_vision, num_text, text_first, block or (1, 1), device)
    if valid is not None:
        keep = _without_padding(keep, num_vision, num_text, text_first, torch.tensor(valid, device=device))
    batch = None if valid is None else len(valid)
    return create_block_mask(keep, batch, len(windows), tokens, tokens, device=device, BLOCK_SIZE=TILE)


def _block_rule(
    windows: tuple[int, ...],
    num_vision: int,
    num_text: int,
    text_first: bool,
    block: tuple[int, int],
    device: torch.device,
) -> Mask:
    maps = [block_map(Arrow(num_vision, num_text, window, text_first), block) for window in windows]
    blocks = torch.stack(maps).to(device)

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return blocks[h, i // block[0], j // block[1]]

    return keep


def _exact_rule(
    windows: tuple[int, ...],
    num_vision: int,
    num_text: int,
    text_first: bool,
    block: tuple[int, int],
    device: torch.device,
) -> Mask:
    per_head = torch.tensor(windows, device=device)
    text = Arrow(num_vision, num_text, -1, text_first).text

    def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        touches_text = ((i >= text.start) & (i < text.stop)) | ((j >= text.start) & (j < text.stop))
        return (per_head[h] < 0) | touches_text | ((i - j).abs() <= per_head[h])

    return keep


def _without_padding(keep: Mask, num_vision: int, num_text: int, text_first: bool, valid: Tensor) -> Mask:
    text = Arrow(num_vision, num_text, -1, text_first).text

    def valid_only(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        is_padding = (j >= text.start + valid[b]) & (j < text.stop)
        return keep(b, h, i, j) & ~is_padding

    return valid_only
