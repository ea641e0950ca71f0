"""Attention of one query over low-rank latents of old tokens and exact recent ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...registry import define
from . import reference

__all__ = ["QuantizedLatents", "cskv_decode"]


class QuantizedLatents(NamedTuple):
    """Latents (batch, tokens, channels) as codes, in the layout of `cskv.functional.quantize`.

    codes: uint8 (batch, tokens, bytes), 8 // bits channels in a byte, the first in the lowest bits.
    scale, offset: float16, one per group; keys (batch, ceil(tokens / group), channels), groups of `group` tokens of one
        channel; values (batch, tokens, channels / group), groups of `group` channels of one token.
    bits: 2, 4 or 8.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    group: int


def _fake(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


_operator = define(reference.cskv_decode, _fake)


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
    *,
    scale: float,
    start: Tensor | None = None,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    k_quantized: QuantizedLatents | None = None,
    v_quantized: QuantizedLatents | None = None,
    clamped: bool = False,
) -> Tensor:
    """Attend to rebuilt old tokens and exact recent ones (CSKV, arXiv 2409.10593, sections 3.4 and 3.6).

    The key of an old token is rope(B_K c_K + bias_k); its value B_V c_V + bias_v is never built: one query needs only
    o_h = B_V,h (sum_t p_t c_t). Where latents are quantised, the first tokens lie in `*_quantized` and those behind
    them in `c_k`, `c_v`; both sides count to the same T_c.

    Args:
        q: (B, H_q, 1, D), rotated; float16, bfloat16, float32 or float64, as are all tensors not told otherwise.
        c_k, c_v: (B, T_c, r_k), (B, T_c, r_v), or what follows the quantised tokens.
        b_k, b_v: (H_kv * D, r_k), (H_kv * D, r_v).
        k_tail, v_tail: (B, H_kv, T_w, D), keys rotated.
        cos, sin: (B or 1, T_c, D_rot / 2), any floating dtype, an entry for each pair of channels (i, i + D_rot / 2)
            that is turned together; None for keys without rotation. Channels from D_rot on pass unchanged.
        scale: factor of the scores.
        start: (B,) int64, first token of each row that is attended, counted from the first old one; None for 0.
        bias_k, bias_v: (H_kv * D,) or None.
        clamped: `offset` is an integer zero point, (code - offset) * scale, and not a minimum, code * scale + offset.

    Returns:
        (B, H_q, 1, D), contiguous; softmax and sums in float32 or better. No gradients. A row with no token is NaN.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes, or when there is no token at all.
    """
    require_tensor("q", q, 4, FLOATS)
    batch, query_heads, queries, head_dim = q.shape
    require(queries == 1, "number of queries", queries, "1")
    for name, value, dims in (
        ("c_k", c_k, 3),
        ("c_v", c_v, 3),
        ("b_k", b_k, 2),
        ("b_v", b_v, 2),
        ("k_tail", k_tail, 4),
        ("v_tail", v_tail, 4),
    ):
        require_tensor(name, value, dims, (q.dtype,))
    heads, recent = k_tail.shape[1:3]
    require(heads > 0 and query_heads % heads == 0, "heads of k_tail", heads, f"a divisor of the {query_heads} of q")
    for name, given, shape in (
        ("k_tail", k_tail, (batch, heads, recent, head_dim)),
        ("v_tail", v_tail, (batch, heads, recent, head_dim)),
        ("b_k", b_k, (heads * head_dim, c_k.shape[2])),
        ("b_v", b_v, (heads * head_dim, c_v.shape[2])),
        ("bias_k", bias_k, (heads * head_dim,)),
        ("bias_v", bias_v, (heads * head_dim,)),
        ("start", start, (batch,)),
    ):
        if given is not None:
            require(given.shape == shape, f"shape of {name}", tuple(given.shape), f"{shape}")
    old = c_k.shape[1] + _check_quantized("k", k_quantized, batch, c_k.shape[2])
    old_values = c_v.shape[1] + _check_quantized("v", v_quantized, batch, c_v.shape[2])
    require(old == old_values, "old tokens of values", old_values, f"{old}, as of keys")
    require(old + recent > 0, "number of tokens", 0, "at least one, old or recent")
    require((cos is None) == (sin is None), "cos and sin", "one of them", "both or neither")
    for name, rows in (("cos", cos), ("sin", sin)):
        if rows is not None:
            require_tensor(name, rows, 3, FLOATS)
            fits = rows.shape[0] in (1, batch) and rows.shape[1] == old and 2 * rows.shape[2] <= head_dim
            valid = f"({batch} or 1, {old}, up to {head_dim // 2})"
            require(fits, f"shape of {name}", tuple(rows.shape), valid)
    if start is not None:
        require_tensor("start", start, 1, (torch.int64,))
    k_parts, v_parts = (quantized or _NOTHING for quantized in (k_quantized, v_quantized))
    return _operator(
        *(q, c_k, c_v, b_k, b_v, k_tail, v_tail, cos, sin, scale, start, bias_k, bias_v),
        *(*k_parts[:3], *v_parts[:3], k_parts[3], v_parts[3], k_parts[4], v_parts[4], clamped),
    )


_NOTHING = (None, None, None, 0, 1)


def _check_quantized(side: str, latents: QuantizedLatents | None, batch: int, channels: int) -> int:
    """Return the number of quantised tokens."""
    if latents is None:
        return 0
    require(latents.bits in (2, 4, 8), f"bits of {side}_quantized", latents.bits, "2, 4 or 8")
    group = latents.group
    fits = group > 0 and (side == "k" or channels % group == 0)
    require(fits, f"group of {side}_quantized", group, "at least 1" if side == "k" else f"a divisor of {channels}")
    require_tensor(f"codes of {side}_quantized", latents.codes, 3, (torch.uint8,))
    tokens = latents.codes.shape[1]
    rows = (batch, -(-tokens // group), channels) if side == "k" else (batch, tokens, channels // group)
    for name, value, shape in (
        ("codes", latents.codes, (batch, tokens, -(-channels * latents.bits // 8))),
        ("scale", latents.scale, rows),
        ("offset", latents.offset, rows),
    ):
        require(value.shape == shape, f"shape of {name} of {side}_quantized", tuple(value.shape), f"{shape}")
    return tokens
