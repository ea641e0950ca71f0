"""Attention by plain products: on a CPU it trains narrow heads on a few hundred tokens twice as fast as a fused one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear, pad, scaled_dot_product_attention

PLAIN = "pared_zoo_plain"
_CACHE_BYTES = 4 * 1024 * 1024


def plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers; without a mask it is causal, and scores have the type of the values.

    Args:
        module: the attention layer; not used.
        query: (rows, heads, tokens, width).
        key: (rows, key-value heads, tokens, width).
        value: shaped like ``key``.
        attention_mask: bool (rows, 1, tokens, tokens), True where a token is seen.
        scaling: of the scores.

    Returns:
        (rows, tokens, heads, width).
    """
    rows, heads, tokens, width = query.shape
    if query.device.type != "cpu":
        causal = attention_mask is None
        out = scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=causal, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=query.device).tril()
    query, key = query.to(value.dtype), key.to(value.dtype)
    hidden = torch.zeros(attention_mask.shape, dtype=value.dtype).masked_fill_(~attention_mask, -torch.inf)
    # The query heads that share a key head stand below each other in one product.
    grouped = (query * scaling).reshape(rows * key.shape[1], -1, width)
    with torch.autocast("cpu", enabled=False):
        scores = grouped @ key.flatten(0, 1).transpose(1, 2)
        scores.view(rows, heads, tokens, tokens).add_(hidden)
        out = scores.softmax(-1) @ value.flatten(0, 1)
    return out.view(rows, heads, tokens, width).transpose(1, 2), None


class PlainJointAttention:
    """A processor of diffusers' joint attention of image and text tokens; called as ``JointAttnProcessor2_0`` is.

    Args:
        near_heads: so many heads, the first ones, are watched: with ``near`` set, each call adds to ``farness`` the
            mean of -log of the share of their attention to image tokens that goes to near ones, with its gradient.

    Attributes:
        near: bool (image tokens, image tokens) or None, which image tokens are near each.
        near_rows: of about so many rows of the batch only, for it costs an attention without fusion.
        farness: one scalar of each call.
    """

    def __init__(self, near_heads: int = 0, near_rows: int = 4) -> None:
        self.near_heads, self.near_rows = near_heads, near_rows
        self.near: torch.Tensor | None = None
        self.farness: list[torch.Tensor] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        text_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from all tokens to all.

        Args:
            attn: the attention layer.
            hidden_states: image tokens (rows, image tokens, width).
            encoder_hidden_states: text tokens (rows, text tokens, width).
            attention_mask: None; the layer always passes one.
            text_bias: added to the scores of text tokens, (rows, text tokens); gets no gradient.

        Returns:
            Both again, changed.
        """
        images, texts = hidden_states.shape[1], encoder_hidden_states.shape[1]
        image = _project(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None), attn.heads)
        text = _project(
            encoder_hidden_states,
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.norm_added_q, attn.norm_added_k, None),
            attn.heads,
        )
        if self.near is not None:
            # From all over the batch, whose rows may be in order of noise.
            several = slice(None, None, max(1, len(hidden_states) // self.near_rows))
            watched_query, watched_key = (x[several, : self.near_heads] for x in image[:2])
            self.farness.append(farness(watched_query, watched_key, self.near))
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
        attend = _products if query.device.type == "cpu" else _fused
        out = attend(query, key, value, text_bias).transpose(1, 2).flatten(2)
        to_image, to_text = out.split([images, texts], dim=1)
        return attn.to_out[0](to_image), to_text if attn.context_pre_only else attn.to_add_out(to_text)


def farness(query: torch.Tensor, key: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Mean of -log of the share of attention that goes to near tokens.

    Args:
        query, key: (rows, heads, tokens, width).
        near: bool (tokens, tokens).
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    scores = scores.float()
    return (scores.logsumexp(-1) - scores.masked_fill(~near, -torch.inf).logsumexp(-1)).mean()


def _project(states: torch.Tensor, layers: Sequence[Any], norms: Sequence[Any], heads: int) -> list[torch.Tensor]:
    """Queries, keys and values (rows, heads, tokens, width) of tokens, in one product."""
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    parts = linear(states, weight, bias).unflatten(-1, (len(layers), heads, -1)).permute(2, 0, 3, 1, 4)
    return [x if norm is None else norm(x).to(x.dtype) for x, norm in zip(parts, norms, strict=True)]


def _products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, text_bias: torch.Tensor | None
) -> torch.Tensor:
    """Attention of (rows, heads, tokens, width) to keys of which the last are text, in the type of the values."""
    rows, heads, _, width = query.shape
    if text_bias is None:
        text_bias = query.new_zeros(rows, 0)
    flat = [x.to(value.dtype).flatten(0, 1) for x in (query * width**-0.5, key, value)]
    return _Products.apply(*flat, text_bias.to(value.dtype).repeat_interleave(heads, dim=0)).unflatten(0, (rows, heads))


class _Products(torch.autograd.Function):
    """Attention of (heads, tokens, width), so many heads at once that their scores stay in the processor's cache."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> Any:
        count, tokens, _ = query.shape
        several = max(1, _CACHE_BYTES // (tokens**2 * value.element_size()))
        ctx.parts = [slice(k, k + several) for k in range(0, count, several)]
        out, kept = torch.empty_like(value), []
        for at in ctx.parts:
            scores = query[at] @ key[at].transpose(1, 2)
            scores[..., tokens - bias.shape[1] :] += bias[at, None, :]
            kept.append(scores.softmax(-1))
            torch.bmm(kept[-1], value[at], out=out[at])
        ctx.save_for_backward(query, key, value, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        grad = grad.contiguous()
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for at, weights in zip(ctx.parts, kept, strict=True):
            torch.bmm(weights.transpose(1, 2), grad[at], out=grads[2][at])
            by_weights = grad[at] @ value[at].transpose(1, 2)
            by_scores = torch.ops.aten._softmax_backward_data(by_weights, weights, -1, weights.dtype)
            torch.bmm(by_scores, key[at], out=grads[0][at])
            torch.bmm(by_scores.transpose(1, 2), query[at], out=grads[1][at])
        return *grads, None


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, text_bias: torch.Tensor | None) -> torch.Tensor:
    """The same on a GPU."""
    if text_bias is not None:
        images = query.shape[2] - text_bias.shape[1]
        text_bias = pad(text_bias.to(query.dtype), (images, 0))[:, None, None, :]
    return scaled_dot_product_attention(query, key, value, text_bias)
