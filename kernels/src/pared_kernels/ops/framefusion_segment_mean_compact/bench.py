"""Shapes of merging in FrameFusion: two thirds of the tokens of a video join their predecessors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...bench import BenchCase
from . import reference


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield 64 and 256 frames of 196 tokens at the widths of Qwen2-7B and a 0.5B model; small ones unless `full`."""
    shapes = ((12544, 3584), (50176, 3584), (12544, 896)) if full else ((1568, 256),)
    for tokens, channels in shapes:
        for dtype in (torch.bfloat16, torch.float16) if full else (torch.float32,):
            hidden = torch.randn(1, tokens, channels, device=device, dtype=dtype)
            segments = tokens // 3
            order = torch.arange(tokens, device=device).view(-1, 196).T.reshape(1, -1).contiguous()
            inner = torch.randperm(tokens - 1, device=device)[: segments - 1].sort().values + 1
            ends = torch.tensor([[0], [tokens]], device=device)
            seg_start = torch.cat((ends[0], inner, ends[1]))[None]
            out_index = order[:, seg_start[0, :-1]].argsort(1).argsort(1)
            yield BenchCase(
                f"N{tokens} to {segments} D{channels}",
                (hidden, order, seg_start, out_index, None),
                bytes=(tokens + segments) * channels * hidden.element_size() + 8 * (tokens + 2 * segments),
                flops=tokens * channels,
                dtype=dtype,
                matrix=False,
                baselines={"torch": reference.framefusion_segment_mean_compact, "index_add and select": _index_add},
            )


def _index_add(hidden: Tensor, order: Tensor, seg_start: Tensor, out_index: Tensor, weight: Tensor | None) -> Tensor:
    """The published way: add members to their anchors in place, divide, select what is left."""
    tokens = hidden.shape[1]
    lengths = seg_start[0].diff()
    anchor = order[0, seg_start[0, :-1]].repeat_interleave(lengths, output_size=tokens)
    sums = torch.zeros_like(hidden[0]).index_add_(0, anchor, hidden[0, order[0]])
    keep = torch.zeros(tokens, dtype=torch.bool, device=hidden.device)
    keep[order[0, seg_start[0, :-1]]] = True
    counts = torch.zeros(tokens, dtype=hidden.dtype, device=hidden.device)
    counts[order[0, seg_start[0, :-1]]] = lengths.to(hidden.dtype)
    return (sums[keep] / counts[keep, None])[None]
