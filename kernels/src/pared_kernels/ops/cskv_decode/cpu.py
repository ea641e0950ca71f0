"""Decode attention over latents, a tile of tokens at a time: never all keys, and no value at all."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import dequantized

TOKENS = 1024
"""Old tokens rebuilt at once, a multiple of every group of quantised tokens that is a divisor of it."""


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
    """Return what `pared_kernels.cskv_decode` does; products in the dtype of `q`, sums in float32 or better."""
    batch, query_heads, _, head_dim = q.shape
    heads, rank_k, rank_v = k_tail.shape[1], c_k.shape[2], c_v.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.view(batch, heads, query_heads // heads, head_dim)
    k_quantised = 0 if k_codes is None else k_codes.shape[1]
    v_quantised = 0 if v_codes is None else v_codes.shape[1]
    old = k_quantised + c_k.shape[1]
    tile = -(-TOKENS // k_group) * k_group

    def keys_of(first: int, end: int) -> Tensor:
        """Rotated keys (B, H_kv, D, n): with tokens last, all that follows runs along memory."""
        c = c_k[:, max(first - k_quantised, 0) : max(end - k_quantised, 0)]
        if first < k_quantised and k_codes is not None and k_scale is not None and k_offset is not None:
            stop = min(end, k_quantised)
            rows = slice(first // k_group, -(-stop // k_group))
            scale_of, offset_of = (
                one[:, rows].repeat_interleave(k_group, dim=1)[:, : stop - first] for one in (k_scale, k_offset)
            )
            codes = dequantized(k_codes[:, first:stop], scale_of, offset_of, rank_k, k_bits, clamped, work)
            c = torch.cat((codes.to(q.dtype), c), dim=1)
        keys = b_k @ c.transpose(1, 2)
        if bias_k is not None:
            keys += bias_k[:, None]
        keys = keys.view(batch, heads, head_dim, end - first)
        if cos is None or sin is None:
            return keys
        return turned(keys, *(one[:, first:end].transpose(1, 2)[:, None] for one in (cos, sin)))

    def latents_of(first: int, end: int) -> Tensor:
        c = c_v[:, max(first - v_quantised, 0) : max(end - v_quantised, 0)]
        if first < v_quantised and v_codes is not None and v_scale is not None and v_offset is not None:
            rows = slice(first, min(end, v_quantised))
            scale_of, offset_of = (one[:, rows].repeat_interleave(v_group, dim=2) for one in (v_scale, v_offset))
            codes = dequantized(v_codes[:, rows], scale_of, offset_of, rank_v, v_bits, clamped, work)
            c = torch.cat((codes.to(q.dtype), c), dim=1)
        return c

    def masked_scores(keys: Tensor, first: int) -> Tensor:
        scores = (grouped @ keys).to(work) * scale
        if start is not None:
            place = torch.arange(first, first + keys.shape[3], device=q.device)
            scores = scores.masked_fill((place < start[:, None])[:, None, None], -torch.inf)
        return scores

    recent = masked_scores(k_tail.transpose(2, 3), old)
    parts = [masked_scores(keys_of(first, min(first + tile, old)), first) for first in range(0, old, tile)]
    weights = torch.cat((*parts, recent), dim=-1).softmax(dim=-1)
    latent = q.new_zeros((batch, heads, grouped.shape[2], rank_v), dtype=work)
    for first in range(0, old, tile):
        end = min(first + tile, old)
        part = weights[..., first:end].to(q.dtype)
        latent += (part.flatten(1, 2) @ latents_of(first, end)).view(latent.shape)
    output = (latent.to(q.dtype) @ b_v.view(heads, head_dim, rank_v).transpose(1, 2)).to(work)
    if bias_v is not None:
        output += weights[..., :old].sum(-1, keepdim=True) * bias_v.view(heads, 1, head_dim)
    output += weights[..., old:].to(q.dtype) @ v_tail
    return output.reshape(batch, query_heads, 1, head_dim).to(q.dtype)


def turned(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of the channels of keys (B, H, D, n); cos and sin (B or 1, 1, half, n)."""
    half, end = cos.shape[2], 2 * cos.shape[2]
    wide = torch.promote_types(keys.dtype, torch.float32)
    first, second, cos, sin = (one.to(wide) for one in (keys[:, :, :half], keys[:, :, half:end], cos, sin))
    cos, sin = cos.contiguous(), sin.contiguous()
    result = torch.empty_like(keys, dtype=wide)
    torch.mul(first, cos, out=result[:, :, :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=result[:, :, half:end]).addcmul_(first, sin)
    result[:, :, end:] = keys[:, :, end:]
    return result.to(keys.dtype)
