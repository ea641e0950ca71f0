"""Shapes of one layer and step of Llama-3.1-8B and LongChat-7B at a fifth of the channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...bench import BenchCase
from .reference import cskv_append as product_and_copies

SHAPES = (("Llama-3.1-8B", 4096, 8, 128, 200), ("LongChat-7B", 4096, 32, 128, 800))
TOKENS = 64


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield both models with one row and with eight; one small layer unless `full`."""
    dtype = torch.bfloat16 if full else torch.float32
    for name, width, heads, head_dim, rank in SHAPES if full else (("small", 256, 2, 64, 32),):
        for batch in (1, 8) if full else (1,):
            arguments = _arguments(batch, width, heads, head_dim, rank, dtype, device)
            numbers = 2 * rank * width + batch * (width + 2 * rank + 4 * heads * head_dim + 2 * head_dim)
            yield BenchCase(
                f"{name} B{batch} r{rank}",
                arguments,
                bytes=numbers * torch.finfo(dtype).bits // 8,
                flops=2 * batch * 2 * rank * width,
                dtype=dtype,
                matrix=False,
                baselines={"torch": product_and_copies},
            )


def _arguments(
    batch: int, width: int, heads: int, head_dim: int, rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    def randn(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device)

    rows = (randn(batch, TOKENS, *size)[:, 40] for size in ((rank,), (rank,), *((heads, head_dim),) * 2))
    pairs = head_dim // 2
    return (
        randn(batch, width),
        randn(2 * rank, width),
        randn(batch, heads, head_dim),
        randn(batch, heads, head_dim),
        *rows,
        randn(batch, pairs),
        randn(batch, pairs),
        *(randn(batch, TOKENS, pairs)[:, 40] for _ in range(2)),
    )
