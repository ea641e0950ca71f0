"""From uniform numbers to tokens: inversion of a distribution, and noise that is a function of its place alone."""

from __future__ import annotations

import torch
from pared_kernels import philox
from torch import Tensor


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token (...,) int64 that each uniform number selects from its distribution.

    The smallest v with c[v] > u c[V - 1], c the cumulative sum of `probs` (..., V) in float64; `probs` need not be
    normalised, `uniforms` (...,) lie in [0, 1). A token of probability 0 is never returned.
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    threshold = uniforms.to(torch.float64)[..., None] * cumulative[..., -1:]
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=probs.shape[-1] - 1)
    # A parallel sum may step by a rounding where nothing is added, and u c[V - 1] may round up to c[V - 1].
    possible = probs.gather(-1, token) > 0
    return torch.where(possible, token, probs.argmax(-1, keepdim=True)).squeeze(-1)


def gumbel(
    seed: int,
    rows: Tensor,
    positions: Tensor,
    vocab: int,
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return standard Gumbel noise (B, K, V) that depends on (seed, row, position, token, stream) alone.

    `rows` (B,) and `positions` (B, K) int64 in [0, 2^32); `seed` in [0, 2^64), `stream` in [0, 2^32). The noise is
    -log(-log r) with r = (lane + 1/2) 2^-32, lane v & 3 of Philox-4x32-10 (Salmon et al., SC 2011) with key (low, high
    word of seed) and counter (v >> 2, position, row, stream). argmax(log p + noise) then has the law p, and the same
    noise gives the same token in every pass, window and batch. Raises ValueError for a seed or stream out of range.
    """
    for name, value, bits in (("seed", seed, 64), ("stream", stream, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} is {value}; valid: 0 <= {name} < 2**{bits}")
    place = positions.device if device is None else torch.device(device)
    return philox.gumbel(seed, rows.to(place), positions.to(place), vocab, stream, dtype)
