"""Decode attention over latents by rebuilding every key and value: obviously right, O(tokens x heads) memory."""

from __future__ import annotations

import torch
from torch import Tensor


def cskv_decode(
    q: Tensor,
    c_k: Tensor,
    c_v: Tensor,
    b_k: Tensor,
    b_v: Tensor,
    k_tail: Tensor,
    v_tail: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    start: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    k_codes: Tensor | None,
    k_scale: Tensor | None,
    k_offset: Tensor | None,
    v_codes: Tensor | None,
    v_scale: Tensor | None,
    v_offset: Tensor | None,
    k_bits: int,
    v_bits: int,
    k_group: int,
    v_group: int,
    clamped: bool,
) -> Tensor:
    """Return what `pared_kernels.cskv_decode` does; `*_bits` 0 where nothing is quantised."""
    batch, query_heads, _, head_dim = q.shape
    heads = k_tail.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    if k_codes is not None and k_scale is not None and k_offset is not None:
        tokens, channels = k_codes.shape[1], c_k.shape[2]
        scale_of, offset_of = (one.repeat_interleave(k_group, dim=1)[:, :tokens] for one in (k_scale, k_offset))
        c_k = torch.cat(
            (dequantized(k_codes, scale_of, offset_of, channels, k_bits, clamped, work), c_k.to(work)), dim=1
        )
    if v_codes is not None and v_scale is not None and v_offset is not None:
        scale_of, offset_of = (one.repeat_interleave(v_group, dim=2) for one in (v_scale, v_offset))
        c_v = torch.cat(
            (dequantized(v_codes, scale_of, offset_of, c_v.shape[2], v_bits, clamped, work), c_v.to(work)), dim=1
        )
    old = c_k.shape[1]
    keys = torch.nn.functional.linear(c_k.to(work), b_k.to(work), None if bias_k is None else bias_k.to(work))
    values = torch.nn.functional.linear(c_v.to(work), b_v.to(work), None if bias_v is None else bias_v.to(work))
    keys, values = (one.view(batch, old, heads, head_dim).transpose(1, 2) for one in (keys, values))
    if cos is not None and sin is not None:
        keys = rotated(keys, cos[:, None].to(work), sin[:, None].to(work))
    keys = torch.cat((keys, k_tail.to(work)), dim=2)
    values = torch.cat((values, v_tail.to(work)), dim=2)
    scores = q.to(work).view(batch, heads, query_heads // heads, head_dim) @ keys.transpose(2, 3) * scale
    if start is not None:
        place = torch.arange(keys.shape[2], device=q.device)
        scores = scores.masked_fill((place < start[:, None])[:, None, None], -torch.inf)
    output = scores.softmax(dim=-1) @ values
    return output.reshape(batch, query_heads, 1, head_dim).to(q.dtype)


def rotated(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of the last dimension, half = cos.shape[-1]; channels behind them pass unchanged."""
    half = cos.shape[-1]
    first, second = keys[..., :half], keys[..., half : 2 * half]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, keys[..., 2 * half :]), dim=-1)


def dequantized(
    codes: Tensor, scale: Tensor, offset: Tensor, channels: int, bits: int, clamped: bool, dtype: torch.dtype
) -> Tensor:
    """Return latents (batch, tokens, channels) of bytes; `scale` and `offset` broadcast to them."""
    places = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    values = ((codes[..., None] >> places) & (2**bits - 1)).flatten(-2)[..., :channels].to(dtype)
    scale, offset = scale.to(dtype), offset.to(dtype)
    return (values - offset) * scale if clamped else values * scale + offset
