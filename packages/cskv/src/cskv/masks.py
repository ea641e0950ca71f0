"""Attention masks for several new tokens at once, each with an exact window of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cskv.errors import UnsupportedAttentionError


def windowed_mask(
    mask: Any, first_exact: Tensor, past: int, rebuilt: int, exact_from: int, implementation: str
) -> Tensor:
    """Mask over the columns [rebuilt 0 .. rebuilt - 1, exact exact_from .. T - 1], from the model's mask over 0 .. T -
    1.

    Tokens between `exact_from` and `rebuilt` appear twice; row i reads the rebuilt one below column `first_exact[i]`
    and the exact one from there on. `mask`: (B, heads or 1, q, >= T), bool or additive, or None for a causal one;
    `first_exact`: (q,) int64. Raises `UnsupportedAttentionError` where the attention implementation takes no such mask.
    """
    queries = len(first_exact)
    total = past + queries
    device = first_exact.device
    if mask is None and implementation == "sdpa":
        mask = torch.ones(queries, total, dtype=torch.bool, device=device).tril(past)[None, None]
    if implementation not in ("sdpa", "eager") or not isinstance(mask, Tensor) or mask.ndim != 4:
        raise UnsupportedAttentionError(
            f"attn_implementation = {implementation!r} takes no mask with two versions of a token, which several new "
            "tokens after a compressed past need (multi-turn chat, chunked prefill, assisted decoding). Use 'sdpa' or "
            "'eager', or a window that covers the past"
        )
    columns = torch.cat((mask[..., :rebuilt], mask[..., exact_from:total]), dim=-1)
    place = torch.arange(total, device=device)
    allowed = torch.cat((place[:rebuilt] < first_exact[:, None], place[exact_from:] >= first_exact[:, None]), dim=-1)
    if columns.dtype == torch.bool:
        return columns & allowed
    return columns.masked_fill(~allowed, torch.finfo(columns.dtype).min)
