"""The functions of the flash-attn package in plain torch, for transformers' own code around them to run on the CPU."""

from __future__ import annotations

import torch


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    """q (batch, queries, heads, dim), k and v (batch, keys, kv_heads, dim); the last query sees the last key."""
    assert window_size == (-1, -1)
    groups = q.shape[2] // k.shape[2]
    k, v = (one.repeat_interleave(groups, 2) for one in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if causal:
        last = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        scores = scores.masked_fill(torch.arange(k.shape[1]) > last, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    """The sequences of a batch one behind the other, without padding."""
    assert int(cu_seqlens_q[-1]) == len(q)
    assert int(cu_seqlens_k[-1]) == len(k)
    parts = [
        flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale=softmax_scale, causal=causal)[0]
        for a, b, c, d in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
    ]
    return torch.cat(parts)


def lazy_imports(implementation, *args, **kwargs):
    """What transformers imports for "flash_attention_2", and nothing for any other name."""
    from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

    if implementation != "flash_attention_2":
        raise ImportError(f"there is no flash attention of the name {implementation!r}")
    return flash_attn_func, flash_attn_varlen_func, None, _pad_input, _unpad_input
