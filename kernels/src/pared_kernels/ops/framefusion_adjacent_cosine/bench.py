"""Shapes of the stages of FrameFusion on video language models."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...bench import BenchCase
from . import reference


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield 64 and 256 frames of 196 tokens at the widths of Qwen2-7B and a 0.5B model; small ones unless `full`."""
    shapes = ((12544, 3584), (50176, 3584), (12544, 896)) if full else ((1568, 256),)
    frame = 196
    for tokens, channels in shapes:
        for dtype in (torch.bfloat16, torch.float16) if full else (torch.float32,):
            hidden = torch.randn(1, tokens, channels, device=device, dtype=dtype)
            prev = (torch.arange(tokens, device=device) - frame).clamp(min=-1)[None]
            yield BenchCase(
                f"N{tokens} D{channels}",
                (hidden, prev),
                # Each row once: as a predecessor it is read again, from the cache.
                bytes=tokens * channels * hidden.element_size() + 12 * tokens,
                flops=6 * tokens * channels,
                dtype=dtype,
                matrix=False,
                baselines={"torch": reference.framefusion_adjacent_cosine},
            )
