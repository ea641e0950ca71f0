"""Shapes of the pruned self-attention of Stable Diffusion: recovery and residual sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...bench import BenchCase


def scatter_add(x: Tensor, y: Tensor, gather_map: Tensor, gate: Tensor | None) -> Tensor:
    """Return the sum as plain torch writes it: gather with an expanded index, then add."""
    return x + y.gather(1, gather_map[..., None].expand(-1, -1, y.shape[2]))


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield full-resolution blocks at 512, 768 and 1024 pixels, 60 % of the tokens kept; small ones unless `full`."""
    shapes = ((2, 4096, 320), (16, 4096, 320), (2, 9216, 320), (2, 16384, 320)) if full else ((2, 1024, 128),)
    for batch, tokens, channels in shapes:
        for dtype in (torch.float16, torch.bfloat16) if full else (torch.float32,):
            kept = tokens - int(0.4 * tokens)
            x = torch.randn(batch, tokens, channels, device=device, dtype=dtype)
            y = torch.randn(batch, kept, channels, device=device, dtype=dtype)
            gather_map = torch.randint(kept, (batch, tokens), device=device)
            yield BenchCase(
                f"B{batch} N{tokens} C{channels} K{kept}",
                (x, y, gather_map, None),
                # Every row of y is read at least once; repeated rows come from the cache.
                bytes=(2 * tokens + kept) * batch * channels * x.element_size() + 8 * batch * tokens,
                flops=batch * tokens * channels,
                dtype=dtype,
                matrix=False,
                baselines={"torch": scatter_add},
            )
