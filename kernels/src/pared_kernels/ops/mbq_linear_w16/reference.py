"""A linear layer with packed weights: unpack, dequantise, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from ...bitstream import unpack_dense


def mbq_linear_w16(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    """Return sum_k x[m, k] (u[n, k] - z[n, k / g]) s[n, k / g] + bias[n], as `pared_kernels.mbq_linear_w16`."""
    weight = dequantize(packed, scales, zeros, bits, group_size, x.shape[1], accumulator(x.dtype))
    product = x.to(weight.dtype) @ weight.T
    return (product if bias is None else product + bias.to(weight.dtype)).to(x.dtype)


def dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight (N, K) in `dtype`, computed in it."""
    rows, groups = scales.shape
    codes = unpack_dense(packed, bits, columns).to(dtype).view(rows, groups, group_size)
    offset = zero_points(zeros, bits, rows)
    centred = codes - (offset if isinstance(offset, int) else offset.to(dtype)[..., None])
    return (centred * scales.to(dtype)[..., None]).view(rows, columns)


def zero_points(zeros: Tensor | None, bits: int, rows: int) -> Tensor | int:
    """Return the zero points uint8 (N, G), or the one of symmetric codes."""
    return 2 ** (bits - 1) if zeros is None else unpack_dense(zeros, bits, rows, dim=0)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that products are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
