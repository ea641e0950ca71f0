"""Shapes of the pruned self-attention of Stable Diffusion: norm1 of the kept tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...bench import BenchCase
from . import reference


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield full-resolution blocks at 512, 768 and 1024 pixels, 60 % of the tokens kept; small ones unless `full`."""
    shapes = ((2, 4096, 320), (16, 4096, 320), (2, 9216, 320), (2, 16384, 320)) if full else ((2, 1024, 128),)
    for batch, tokens, channels in shapes:
        for dtype in (torch.float16, torch.bfloat16) if full else (torch.float32,):
            kept = tokens - int(0.4 * tokens)
            x = torch.randn(batch, tokens, channels, device=device, dtype=dtype)
            index = torch.rand(batch, tokens, device=device).argsort(1)[:, :kept].sort(1).values
            weight, bias = torch.randn(2, channels, device=device, dtype=dtype)
            yield BenchCase(
                f"B{batch} N{tokens} C{channels} K{kept}",
                (x, index, weight, bias, 1e-5),
                bytes=2 * batch * kept * channels * x.element_size() + 8 * batch * kept,
                flops=8 * batch * kept * channels,
                dtype=dtype,
                matrix=False,
                baselines={"torch": reference.dato_norm_gather},
            )
