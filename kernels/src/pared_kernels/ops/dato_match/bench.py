"""Shapes of the token matching in Stable Diffusion: candidates to bases, and pruned to kept at ratio 0.4."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...bench import BenchCase


def dense(metric: Tensor, query_idx: Tensor, key_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return the match as plain torch writes it, in the dtype of the metric: normalise, gather, bmm, max."""
    direction = torch.nn.functional.normalize(metric, dim=-1)
    samples = torch.arange(metric.shape[0], device=metric.device)[:, None]
    best = torch.bmm(direction[samples, query_idx], direction[samples, key_idx].transpose(1, 2)).max(dim=-1)
    return best.values, best.indices


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield full-resolution blocks at 512, 768 and 1024 pixels with guidance; one small block unless `full`."""
    shapes = ((2, 1024, 320), (2, 4096, 320), (16, 4096, 320), (2, 9216, 320), (2, 16384, 320))
    for batch, tokens, channels in shapes if full else ((2, 1024, 128),):
        pruned = int(0.4 * tokens)
        for kind, queries, keys in (("max", tokens - tokens // 4, tokens // 4), ("kept", pruned, tokens - pruned)):
            for dtype in (torch.float16, torch.bfloat16) if full else (torch.float32,):
                metric = torch.randn(batch, tokens, channels, device=device, dtype=dtype)
                order = torch.rand(batch, tokens, device=device).argsort(1)
                query_idx = order[:, :queries].sort(1).values
                key_idx = order[:, queries:].sort(1).values
                yield BenchCase(
                    f"{kind} B{batch} N{tokens} C{channels} Q{queries} K{keys}",
                    (metric, query_idx, key_idx),
                    bytes=metric.numel() * metric.element_size() + batch * (8 * (queries + keys) + 12 * queries),
                    flops=2 * batch * queries * keys * channels,
                    dtype=dtype,
                    matrix=True,
                    baselines={"torch": dense},
                )
