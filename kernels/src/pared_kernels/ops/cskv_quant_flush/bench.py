"""One finished group of a layer of Llama-3.1-8B and LongChat-7B at a fifth of the channels, and a prompt's groups."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...bench import BenchCase
from .reference import cskv_quant_flush as by_torch

GROUP = 32


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield keys and values in four bits; one small group unless `full`."""
    dtype = torch.bfloat16 if full else torch.float32
    shapes = (("Llama-3.1-8B", 8, 200), ("LongChat-7B", 32, 800)) if full else (("small", 2, 32),)
    for name, heads, rank in shapes:
        for batch, tokens in ((1, GROUP), (8, GROUP), (1, 8192)) if full else ((1, GROUP),):
            for per_token in (False, True):
                group = rank // heads if per_token else GROUP
                rows = (tokens, rank // group) if per_token else (tokens // group, rank)
                latents = torch.randn(batch, tokens, rank, dtype=dtype, device=device)
                codes = torch.zeros(batch, tokens, rank // 2, dtype=torch.uint8, device=device)
                scale, offset = (torch.zeros(batch, *rows, dtype=torch.float16, device=device) for _ in range(2))
                yield BenchCase(
                    f"{name} {'values' if per_token else 'keys'} B{batch} T{tokens} r{rank}",
                    (latents, codes, scale, offset, 4, group, per_token, False),
                    bytes=latents.numel() * latents.element_size() + codes.numel() + 4 * scale.numel(),
                    flops=5 * latents.numel(),
                    dtype=dtype,
                    matrix=False,
                    baselines={"torch": by_torch},
                )
