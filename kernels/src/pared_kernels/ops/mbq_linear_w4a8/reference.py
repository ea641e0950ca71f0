"""A linear layer of 4-bit weights and 8-bit activations: quantise the tokens, multiply integers, scale."""

from __future__ import annotations

import torch
from torch import Tensor

from ...bitstream import unpack_dense

BITS = 4
SMALLEST = 1e-5
"""Floor of a token's largest magnitude, as in the paper's code."""


def mbq_linear_w4a8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return y[m, n] = sx[m] sw[n] sum_k qx[m, k] qw[n, k] + bias[n], as `pared_kernels.mbq_linear_w4a8`."""
    codes, scale = quantize_tokens(x, 8)
    weight = unpack_dense(packed, BITS, x.shape[1]).to(torch.float64) - 2 ** (BITS - 1)
    # float64 holds every sum of these integers exactly, on any device.
    return finish(codes.to(torch.float64) @ weight.T, scale, scales, bias, x.dtype)


def finish(sums: Tensor, scale: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return integer `sums` (M, N) times token scales (M, 1) and row scales (N, 1), plus `bias`, in `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    product = sums.to(wide) * scale.to(wide) * scales.to(wide).T
    return (product if bias is None else product + bias.to(wide)).to(dtype)


def quantize_tokens(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes int8 like x and float32 scales (..., 1): symmetric, max |x| of each token over 2^(bits - 1) - 1.

    Computed in float32 for every dtype of x, so that all backends give the same codes.
    """
    exact = x.to(torch.float32)
    largest = 2 ** (bits - 1) - 1
    scale = exact.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / largest
    return (exact / scale).round().clamp(-largest - 1, largest).to(torch.int8), scale
