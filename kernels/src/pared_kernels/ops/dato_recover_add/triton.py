"""Residual plus recovered tokens: one read of x and of the gathered rows, one write."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def recover_add_kernel(
    x_ptr,
    y_ptr,
    map_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    stride_x_batch,
    stride_x_token,
    stride_x_channel,
    stride_y_batch,
    stride_y_token,
    stride_y_channel,
    stride_map_batch,
    stride_map,
    stride_gate_batch,
    stride_gate_channel,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_row = row < tokens
    is_channel = channel < CHANNELS
    mask = is_row[:, None] & is_channel[None, :]
    source = tl.load(map_ptr + batch * stride_map_batch + row * stride_map, is_row, other=0)
    y_rows = y_ptr + batch * stride_y_batch + source[:, None] * stride_y_token
    y = tl.load(y_rows + channel[None, :] * stride_y_channel, mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + batch * stride_gate_batch + channel * stride_gate_channel, is_channel, other=0.0)
        y *= gate.to(tl.float32)[None, :]
    x_rows = x_ptr + batch * stride_x_batch + row[:, None] * stride_x_token
    x = tl.load(x_rows + channel[None, :] * stride_x_channel, mask, other=0.0).to(tl.float32)
    out = out_ptr + (batch * tokens + row[:, None]) * CHANNELS + channel[None, :]
    tl.store(out, (x + y).to(out_ptr.dtype.element_ty), mask)


def constants(channels: int, has_gate: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the kernel's constants and launch options for this many channels."""
    block = min(1024, triton.next_power_of_2(channels))
    chosen = {
        "CHANNELS": channels,
        "BLOCK_ROWS": max(1, 2048 // block),
        "BLOCK_CHANNELS": block,
        "HAS_GATE": has_gate,
    }
    return chosen, {"num_warps": 4, "enable_fp_fusion": True}


def unsupported(x: Tensor, y: Tensor, gather_map: Tensor, gate: Tensor | None) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    return "float64 is left to the reference" if x.element_size() == 8 else None


def dato_recover_add(x: Tensor, y: Tensor, gather_map: Tensor, gate: Tensor | None) -> Tensor:
    """Return what `pared_kernels.dato_recover_add` does; `gate` is (batch, channels) or None."""
    batch, tokens, channels = x.shape
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    chosen, options = constants(channels, gate is not None)
    grid = (triton.cdiv(tokens, chosen["BLOCK_ROWS"]), triton.cdiv(channels, chosen["BLOCK_CHANNELS"]), batch)
    recover_add_kernel[grid](
        x,
        y,
        gather_map,
        x if gate is None else gate,
        out,
        tokens,
        *x.stride(),
        *y.stride(),
        *gather_map.stride(),
        *((0, 0) if gate is None else gate.stride()),
        **chosen,
        **options,
    )
    return out
