"""Blocks of the transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers.cache_utils import Cache


class RMSNorm(nn.Module):
    """Root mean square normalisation in float32, scaled afterwards."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states.float(), self.weight.shape, eps=self.eps).type_as(hidden_states) * self.weight


class Attention(nn.Module):
    """Self-attention; ``attend`` computes it and may be replaced by a function of the same arguments."""

    def __init__(self, hidden_size: int, heads: int, dropout: float, index: int) -> None:
        super().__init__()
        self.wqkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.wo = nn.Linear(hidden_size, hidden_size, bias=False)
        self.resid_dropout = nn.Dropout(dropout)
        self.heads, self.index = heads, index
        self.attend: Callable[..., tuple[torch.Tensor, None]] = fused_attention

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        parts = self.wqkv(hidden_states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = rotate(parts[0], *rotation), rotate(parts[1], *rotation), parts[2]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.index)
        out, _ = self.attend(self, query, key, value, attention_mask, scaling=query.shape[-1] ** -0.5)
        return self.resid_dropout(self.wo(out.flatten(-2)))


class FeedForward(nn.Module):
    """``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, hidden_size: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, inner, bias=False)
        self.w3 = nn.Linear(hidden_size, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden_size, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.ffn_dropout(self.w2(silu(self.w1(hidden_states)) * self.w3(hidden_states)))


class TransformerBlock(nn.Module):
    """Attention and a feed-forward, each behind a norm and beside the residual."""

    def __init__(self, hidden_size: int, inner: int, heads: int, eps: float, dropout: float, index: int) -> None:
        super().__init__()
        self.attention = Attention(hidden_size, heads, dropout, index)
        self.feed_forward = FeedForward(hidden_size, inner, dropout)
        self.attention_norm = RMSNorm(hidden_size, eps)
        self.ffn_norm = RMSNorm(hidden_size, eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        states = self.attention(self.attention_norm(hidden_states), rotation, attention_mask, past_key_values)
        hidden_states = hidden_states + states
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn channels (2 j, 2 j + 1) of (rows, heads, n, width) by angles (..., n, width / 2), in float32."""
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cosine, sine)).flatten(-2).type_as(states)


def fused_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, None]:
    """Attention with the arguments and the result of those of transformers: (rows, n, heads, width)."""
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and 1 < queries < keys:
        # The causal mode of the fused kernels counts both from the first place.
        shape = (queries, keys)
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(keys - queries)
    causal = attention_mask is None and queries > 1
    out = scaled_dot_product_attention(query, key, value, attention_mask, is_causal=causal, scale=scaling)
    return out.transpose(1, 2), None
