"""Counter-based noise in plain torch: a sum of uniforms drawn from Philox4x32-10."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...philox import WORD, philox

# The sum of 16 integers, each uniform on 0..65535.
NOISE_MEAN = 16 * 65535 // 2
NOISE_SCALE = 1.0 / math.sqrt(16 * (65536**2 - 1) / 12)


def noise(samples: int, tokens: int, seed: int, call: int, block: int, device: torch.device) -> Tensor:
    """Return (samples, tokens) float32 noise of mean 0 and variance 1 (see `dato_score_select`)."""
    token = torch.arange(tokens, device=device)
    # Two blocks of 128 bits a token: even and odd counters.
    word = torch.stack([2 * token, 2 * token + 1])[:, None]
    sample = torch.arange(samples, device=device)[:, None]
    shape = (2, samples, tokens)
    counter = (word.expand(shape), sample.expand(shape), torch.full_like(word, block), torch.full_like(word, call))
    words = philox(counter, (seed & WORD, seed >> 32))
    total = torch.stack([(bits & 0xFFFF) + (bits >> 16) for bits in words]).sum(dim=(0, 1))
    # The sum is exact in float32, so the product is the only rounding.
    return (total - NOISE_MEAN).float() * torch.tensor(NOISE_SCALE, dtype=torch.float32, device=device)
