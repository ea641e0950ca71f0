"""Attention by plain products is the attention that it stands for."""

from __future__ import annotations

import pytest
import torch
from pared_zoo.recipes.attention import plain_attention
from torch.nn.functional import scaled_dot_product_attention


@pytest.mark.parametrize("masked", [False, True])
def test_plain_products_are_attention_with_shared_key_heads(masked):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 40, 8, generator=generator).requires_grad_() for heads in (6, 2, 2))
    mask = None
    if masked:
        mask = (torch.rand(2, 1, 40, 40, generator=generator) < 0.6) | torch.eye(40, dtype=torch.bool)
    got, _ = plain_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.2)
    wanted = scaled_dot_product_attention(query, key, value, mask, is_causal=not masked, scale=0.2, enable_gqa=True)
    assert torch.allclose(got, wanted.transpose(1, 2), atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), (query, key, value)) for out in (got, wanted)]
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
