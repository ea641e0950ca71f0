"""Finished groups of latents into packed codes, scales and offsets, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...registry import define
from . import reference

__all__ = ["cskv_quant_flush"]

_operator = define(reference.cskv_quant_flush, lambda *given: None, mutates=("codes", "scale", "offset"))


def cskv_quant_flush(
    latents: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor,
    *,
    bits: int,
    group: int,
    per_token: bool,
    clamped: bool = False,
) -> None:
    """Quantise latents and write them where they belong (CSKV, arXiv 2409.10593, section 3.5; KIVI's grouping).

    With n = 2^bits - 1 and, over a group, step = max(max - min, 1e-5) / n, a code is round((x - min) / step): x is
    code * scale + offset, where `offset` is the minimum. `clamped` is the published code's rule: the offset is the
    integer zero = clamp(-round(min / step), 0, n) and x is (code - zero) * scale. All in float32 or better.

    What is written are rows of a cache, views of its tensors at the tokens' place.

    Args:
        latents: (B, T, r), float16, bfloat16, float32 or float64, any strides.
        codes: (B, T, ceil(r * bits / 8)) uint8, written: 8 // bits channels in a byte, the first in the lowest bits.
        scale, offset: float16, written: (B, T / group, r) for groups of `group` tokens of one channel (keys), (B, T, r
            / group) for groups of `group` channels of one token (`per_token`, values).
        bits: 2, 4 or 8.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes. Values beyond float16 become infinite.
    """
    require_tensor("latents", latents, 3, FLOATS)
    require_tensor("codes", codes, 3, (torch.uint8,))
    require(bits in (2, 4, 8), "bits", bits, "2, 4 or 8")
    batch, tokens, channels = latents.shape
    size, name = (channels, "channels") if per_token else (tokens, "tokens")
    require(group > 0 and size % group == 0, "group", group, f"a divisor of the {size} {name}")
    rows = (batch, tokens, channels // group) if per_token else (batch, tokens // group, channels)
    for label, tensor, shape in (
        ("codes", codes, (batch, tokens, -(-channels * bits // 8))),
        ("scale", scale, rows),
        ("offset", offset, rows),
    ):
        require(tensor.shape == shape, f"shape of {label}", tuple(tensor.shape), f"{shape}")
    for label, tensor in (("scale", scale), ("offset", offset)):
        require_tensor(label, tensor, 3, (torch.float16, torch.float64))
    _operator(latents, codes, scale, offset, bits, group, per_token, clamped)
