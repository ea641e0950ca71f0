"""Counter-based noise in plain torch: Philox4x32-10 (Salmon et al., SC 2011) and a sum of uniforms drawn from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# The sum of 16 integers, each uniform on 0..65535.
NOISE_MEAN = 16 * 65535 // 2
NOISE_SCALE = 1.0 / math.sqrt(16 * (65536**2 - 1) / 12)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four int64 tensors of 32 random bits for counters (int64 tensors of 32-bit words) under a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


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


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # The int64 product wraps, but its 64 bits are those of the unsigned product.
    product = word * factor
    return (product >> 32) & WORD, product & WORD
