"""Counter-based random bits in plain torch: Philox4x32-10 (Salmon et al., SC 2011), and Gumbel noise from them."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


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


def gumbel(
    seed: int, rows: Tensor, positions: Tensor, vocab: int, stream: int, dtype: torch.dtype, first: int = 0
) -> Tensor:
    """Return standard Gumbel noise (batch, positions, vocab) that depends on (seed, row, position, id, stream) alone.

    `rows` (batch,) and `positions` (batch, positions) int64, non-negative and below 2**32; ids are `first` and the
    `vocab` - 1 behind it. Id v takes lane v & 3 of the counter (v >> 2, position, row, stream) under the key (low, high
    word of seed); the noise is -log(-log(r)), r = (lane + 1/2) 2**-32. It is computed in float64: in float32 the
    largest r would round to 1, and their noise be infinite.
    """
    block = torch.arange(first >> 2, (first + vocab + 3) >> 2, device=positions.device)
    shape = (*positions.shape, len(block))
    counter = (
        block.expand(shape),
        positions[..., None].expand(shape),
        rows[:, None, None].expand(shape),
        torch.full((), stream, dtype=torch.int64, device=positions.device).expand(shape),
    )
    lanes = torch.stack(philox(counter, (seed & WORD, (seed >> 32) & WORD)), dim=-1).flatten(-2)[..., first & 3 :][
        ..., :vocab
    ]
    uniform = (lanes.double() + 0.5) * 2.0**-32
    return uniform.log_().neg_().log_().neg_().to(dtype)


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # The int64 product wraps, but its 64 bits are those of the unsigned product.
    product = word * factor
    return (product >> 32) & WORD, product & WORD
