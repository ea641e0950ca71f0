"""Shapes of pruning in FrameFusion: the keys of one layer of a video language model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...bench import BenchCase
from . import reference


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield Qwen2-7B and 0.5B at 12.5k and 50k tokens; a small model unless `full`."""
    shapes = ((28, 4, 12544, 128), (28, 4, 50176, 128), (14, 2, 12544, 64)) if full else ((6, 2, 1568, 32),)
    for heads, kv_heads, tokens, dim in shapes:
        for dtype in (torch.bfloat16, torch.float16) if full else (torch.float32,):
            query = torch.randn(1, heads, 1, dim, device=device, dtype=dtype)
            key = torch.randn(1, kv_heads, tokens, dim, device=device, dtype=dtype)
            yield BenchCase(
                f"H{heads}/{kv_heads} N{tokens} d{dim}",
                (query, key, dim**-0.5, None),
                bytes=kv_heads * tokens * dim * key.element_size() + 4 * tokens,
                flops=2 * heads * tokens * dim,
                dtype=dtype,
                matrix=False,
                baselines={"torch": reference.framefusion_last_query_scores, "repeated heads": _repeated},
            )


def _repeated(query: Tensor, key: Tensor, scaling: float, key_valid: Tensor | None) -> Tensor:
    """The published way: repeat the key heads, softmax in float32, mean over heads."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query @ key.transpose(-1, -2) * scaling).softmax(-1, dtype=torch.float32).mean((1, 2))
