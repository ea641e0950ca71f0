"""Shapes of the base-token selection: latents of Stable Diffusion with guidance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...bench import BenchCase


def eager(current: Tensor, previous: Tensor, *rest: Any) -> Tensor:
    """Return base tokens of 2 x 2 patches as plain torch writes it, with the noise of the device's generator."""
    half = current.shape[0] // 2
    height, width = current.shape[2:]
    score = (current[:half].float() - previous[:half].float()).abs().mean(1).flatten(1)
    score = score / score.mean(1, keepdim=True) + 0.1 * torch.randn_like(score)
    offset = score.view(half, height // 2, 2, width // 2, 2).transpose(2, 3).flatten(3).argmax(-1)
    row = torch.arange(height // 2, device=score.device)[:, None] * 2 + offset // 2
    column = torch.arange(width // 2, device=score.device) * 2 + offset % 2
    return (row * width + column).flatten(1).repeat(2, 1)


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield 512, 768 and 1024 pixels at batch 1, 512 at batch 8, doubled by guidance; one small unless `full`."""
    for batch, size in ((2, 64), (16, 64), (2, 96), (2, 128)) if full else ((2, 32),):
        dtype = torch.float16 if full else torch.float32
        current, previous = torch.randn(2, batch, 4, size, size, device=device, dtype=dtype)
        patches = (size // 2) ** 2
        yield BenchCase(
            f"B{batch} {size}x{size}",
            (current, previous, size, size, 2, 2, 1.0, 0.1, True, 0, 1, 0, 2),
            # The unconditional half of both predictions is read, all indices are written.
            bytes=current.numel() * current.element_size() + 8 * batch * patches,
            flops=batch // 2 * size * size * 12,
            dtype=dtype,
            matrix=False,
            baselines={"torch": eager},
        )
