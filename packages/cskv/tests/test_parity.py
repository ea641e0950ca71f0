"""The published code's semantics, written down independently: block windows, clamped zero points, full-size tensors."""

from __future__ import annotations

import math

import pytest
import torch
from cskv import CSKVConfig, applied, fit


def rounded(x, bits, dim):
    """The published quantiser over one group along `dim`."""
    levels = 2**bits - 1
    scale = (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)).clamp(min=1e-5) / levels
    zero = (-(x.amin(dim, keepdim=True) / scale).round()).clamp(0, levels)
    return (((x / scale).round() + zero).clamp(0, levels) - zero) * scale


def turned(x, cos, sin):
    """Rotate (T, heads, D) by (T, D)."""
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]


def published_logits(model, ids, prompt, window, factors, bits):
    """Logits of every token behind the prompt, each from full-size keys and values of all tokens before it."""
    base, heads = model.model, model.config.num_key_value_heads
    size = model.config.hidden_size // model.config.num_attention_heads
    cos, sin = (one[0] for one in base.rotary_emb(base.embed_tokens(ids), torch.arange(ids.shape[1])[None]))
    states = base.embed_tokens(ids)[0]
    tokens = len(states)
    for index, layer in enumerate(base.layers):
        x, attention = layer.input_layernorm(states), layer.self_attn
        q = turned(attention.q_proj(x).view(tokens, -1, size), cos, sin)
        k = turned(attention.k_proj(x).view(tokens, heads, size), cos, sin)
        v = attention.v_proj(x).view(tokens, heads, size)
        output = torch.zeros_like(q)
        for t in range(tokens):
            seen = t + 1
            exact = seen if t < prompt else (seen % window or window)
            old = seen - exact
            c_k, c_v = x[:old] @ factors[index].a_k.T, x[:old] @ factors[index].a_v.T
            if bits is not None and old:
                # All old windows are whole: an unfinished one is the exact tail.
                c_k = torch.cat([rounded(part, bits, 0) for part in c_k.split(window)])
                c_v = rounded(c_v.view(old, heads, -1), bits, -1).view(old, -1)
            keys = turned((c_k @ factors[index].b_k.T).view(old, heads, size), cos[:old], sin[:old])
            values = (c_v @ factors[index].b_v.T).view(old, heads, size)
            keys, values = torch.cat((keys, k[old:seen])), torch.cat((values, v[old:seen]))
            keys, values = (one.repeat_interleave(q.shape[1] // heads, 1) for one in (keys, values))
            weights = (torch.einsum("hd,thd->ht", q[t], keys) / math.sqrt(size)).softmax(-1)
            output[t] = torch.einsum("ht,thd->hd", weights, values)
        states = states + attention.o_proj(output.flatten(1))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return model.lm_head(base.norm(states))[prompt:]


@pytest.mark.parametrize("family", ["llama", "llama-mha"])
@pytest.mark.parametrize("prompt", [5, 16, 21])
@pytest.mark.parametrize("bits", [None, 4])
@torch.no_grad()
def test_block_windows_and_clamped_zeros_give_the_logits_of_the_published_code(
    language_model, tokens, family, prompt, bits
):
    model, ids = language_model(family, initializer_range=0.03), tokens(1, 34)
    config = CSKVConfig(
        k_density=0.5,
        v_density=0.5,
        init="svd",
        window=8,
        window_policy="block",
        quant_group=8,
        k_bits=bits,
        v_bits=bits,
        zero_point="clamped",
    )
    factors = fit(model, config)
    with applied(model, config, factors):
        out = model(ids[:, :prompt], use_cache=True)
        logits = []
        for place in range(prompt, 34):
            out = model(ids[:, place : place + 1], past_key_values=out.past_key_values)
            logits.append(out.logits[0])
    expected = published_logits(model, ids, prompt, 8, factors, bits)
    assert float((torch.cat(logits) - expected).abs().max()) <= 2e-3
    assert float((model(ids).logits[0, prompt:] - expected).abs().max()) > 4e-3
