"""One program per row of the result and block of channels; it adds the members in order."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 2048


@triton.jit
def segment_mean_kernel(
    hidden_ptr,
    order_ptr,
    start_ptr,
    index_ptr,
    weight_ptr,
    out_ptr,
    tokens,
    segments,
    stride_batch,
    stride_token,
    stride_channel,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2).to(tl.int64)
    inside = channel < CHANNELS
    starts = start_ptr + batch * (segments + 1) + segment
    first = tl.load(starts)
    last = tl.load(starts + 1)
    total = tl.zeros([BLOCK], tl.float32)
    weights = 0.0
    rows = hidden_ptr + batch * stride_batch + channel * stride_channel
    for place in range(first, last):
        token = tl.load(order_ptr + batch * tokens + place)
        x = tl.load(rows + token * stride_token, inside, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + batch * tokens + token)
            total += x * weight
            weights += weight
        else:
            total += x
            weights += 1.0
    mean = tl.where(weights > 0.0, total / tl.where(weights > 0.0, weights, 1.0), 0.0)
    row = tl.load(index_ptr + batch * segments + segment)
    out = out_ptr + (batch * segments + row) * CHANNELS + channel
    tl.store(out, mean.to(out_ptr.dtype.element_ty), inside)


def constants(channels: int, has_weight: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the kernel's constants and launch options for this many channels."""
    block = min(MAX_BLOCK, triton.next_power_of_2(channels))
    options = {"num_warps": 4 if block >= 512 else 1, "enable_fp_fusion": True}
    return {"CHANNELS": channels, "BLOCK": block, "HAS_WEIGHT": has_weight}, options


def unsupported(
    hidden: Tensor, order: Tensor, seg_start: Tensor, out_index: Tensor, weight: Tensor | None
) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    return "float64 is left to the reference" if hidden.dtype == torch.float64 else None


def framefusion_segment_mean_compact(
    hidden: Tensor, order: Tensor, seg_start: Tensor, out_index: Tensor, weight: Tensor | None
) -> Tensor:
    """Return what `pared_kernels.framefusion_segment_mean_compact` does."""
    batch, tokens, channels = hidden.shape
    segments = out_index.shape[1]
    out = hidden.new_empty((batch, segments, channels))
    if out.numel() == 0:
        return out
    chosen, options = constants(channels, weight is not None)
    order, seg_start, out_index = order.contiguous(), seg_start.contiguous(), out_index.contiguous()
    segment_mean_kernel[(segments, triton.cdiv(channels, chosen["BLOCK"]), batch)](
        hidden,
        order,
        seg_start,
        out_index,
        hidden if weight is None else weight.contiguous(),
        out,
        tokens,
        segments,
        *hidden.stride(),
        **chosen,
        **options,
    )
    return out
