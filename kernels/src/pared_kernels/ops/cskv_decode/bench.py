"""One layer and step of Llama-3.1-8B at a fifth of the channels, and of LongChat-7B, where rebuilding costs more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...bench import BenchCase
from .reference import rotated

# name, query heads, key-value heads, channels of a head, rank of keys and of values
LLAMA = ("Llama-3.1-8B", 32, 8, 128, 200)
LONGCHAT = ("LongChat-7B", 32, 32, 128, 800)
RECENT = 33


def rebuild(*arguments: Any) -> Tensor:
    """Return the attention as plain torch writes it: rebuild all keys and values, then one call of SDPA."""
    q, c_k, c_v, b_k, b_v, k_tail, v_tail, cos, sin, scale = arguments[:10]
    batch, _, _, head_dim = q.shape
    heads = k_tail.shape[1]
    keys, values = (
        (c @ b.T).view(batch, c.shape[1], heads, head_dim).transpose(1, 2) for c, b in ((c_k, b_k), (c_v, b_v))
    )
    keys = torch.cat((rotated(keys, cos[:, None], sin[:, None]), k_tail), dim=2)
    values = torch.cat((values, v_tail), dim=2)
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=scale, enable_gqa=True)


def full_cache(*shape: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """Return SDPA over exact keys and values of this shape, which is what compression competes with."""
    keys, values = (torch.randn(*shape, dtype=dtype, device=device) for _ in range(2))

    def attend(q: Tensor, *rest: Any) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return attend


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield both models over tokens and batches; one small layer unless `full`."""
    if not full:
        yield case("small", 8, 2, 64, 32, 1, 1024, torch.float32, device)
        return
    for batch, tokens in ((1, 8192), (1, 16384), (1, 32768), (1, 131072), (8, 8192), (8, 32768)):
        yield case(*LLAMA, batch, tokens, torch.bfloat16, device)
    yield case(*LLAMA, 1, 32768, torch.float16, device)
    for batch, tokens in ((1, 8192), (1, 32768)):
        yield case(*LONGCHAT, batch, tokens, torch.bfloat16, device)


def case(
    name: str,
    query_heads: int,
    heads: int,
    head_dim: int,
    rank: int,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> BenchCase:
    """Return one step after `tokens` old tokens, with its bytes and FLOPs: keys are rebuilt, values are not."""

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device)

    width = heads * head_dim
    angles = torch.rand(batch, tokens, head_dim // 2, device=device)
    arguments = (
        randn(batch, query_heads, 1, head_dim),
        randn(batch, tokens, rank),
        randn(batch, tokens, rank),
        randn(width, rank) * rank**-0.5,
        randn(width, rank) * rank**-0.5,
        randn(batch, heads, RECENT, head_dim),
        randn(batch, heads, RECENT, head_dim),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        head_dim**-0.5,
        *(None,) * 9,
        *(0, 0, 1, 1, False),
    )
    read = batch * (2 * tokens * rank + tokens * head_dim + 2 * RECENT * width) + 2 * width * rank
    of_old = rank * width + query_heads * head_dim + query_heads * rank
    return BenchCase(
        f"{name} B{batch} T{tokens} r{rank}",
        arguments,
        bytes=read * torch.finfo(dtype).bits // 8,
        flops=2 * batch * (tokens * of_old + 2 * RECENT * query_heads * head_dim),
        dtype=dtype,
        matrix=True,
        baselines={
            "torch": rebuild,
            "full cache": full_cache(batch, heads, tokens + RECENT, head_dim, dtype=dtype, device=device),
        },
    )
