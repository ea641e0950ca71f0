"""Joint attention of image and text by plain products is the attention of diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from pared_zoo.recipes import attention
from pared_zoo.recipes.attention import PlainJointAttention, farness


def joint(pre_only: bool, qk_norm: str | None) -> Attention:
    layer = Attention(
        query_dim=24, added_kv_proj_dim=24, dim_head=8, heads=3, out_dim=24, context_pre_only=pre_only, bias=True,
        qk_norm=qk_norm, processor=JointAttnProcessor2_0(),
    )  # fmt: skip
    return layer.double()


@pytest.mark.parametrize("cache", [1, 2 * 13 * 13 * 8, 1 << 20])
@pytest.mark.parametrize(("pre_only", "qk_norm"), [(False, None), (True, "rms_norm")])
def test_outputs_and_gradients_are_those_of_diffusers(monkeypatch, cache, pre_only, qk_norm):
    monkeypatch.setattr(attention, "_CACHE_BYTES", cache)
    layer = joint(pre_only, qk_norm)
    image, text = (torch.randn(2, n, 24, dtype=torch.float64, requires_grad=True) for n in (9, 4))
    found = []
    for processor in (JointAttnProcessor2_0(), PlainJointAttention()):
        layer.set_processor(processor)
        outputs = layer(image, encoder_hidden_states=text)[: 1 if pre_only else 2]
        weight = torch.linspace(-1, 1, 24, dtype=torch.float64)
        gradients = torch.autograd.grad(sum((x * weight).square().sum() for x in outputs), (image, text))
        found.append([*outputs, *gradients])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_farness_is_minus_the_log_of_the_share_of_near_tokens():
    query, key = (torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    near = (torch.arange(6)[:, None] - torch.arange(6)).abs() <= 1
    found = farness(query, key, near)
    share = ((query @ key.transpose(2, 3) / 8**0.5).softmax(-1) * near).sum(-1)
    torch.testing.assert_close(found.double(), -share.log().mean(), rtol=1e-5, atol=1e-6)
    before = float(found)
    for x, slope in zip((query, key), torch.autograd.grad(found, (query, key)), strict=True):
        x.data -= slope
    assert float(farness(query, key, near)) < before


def test_only_some_rows_and_the_first_heads_are_looked_at():
    layer = joint(False, None)
    image, text = (torch.randn(4, n, 24, dtype=torch.float64) for n in (9, 4))
    processor = PlainJointAttention(near_heads=2, near_rows=2)
    layer.set_processor(processor)
    layer(image, encoder_hidden_states=text)
    assert processor.farness == []
    processor.near = torch.eye(9, dtype=torch.bool)
    layer(image, encoder_hidden_states=text)
    query, key = (x(image[::2]).unflatten(-1, (3, 8)).transpose(1, 2)[:, :2] for x in (layer.to_q, layer.to_k))
    torch.testing.assert_close(processor.farness, [farness(query, key, processor.near)])


@pytest.mark.parametrize("attend", [attention._products, attention._fused])
def test_a_bias_of_text_repeats_its_tokens(attend):
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.zeros(2, 2, dtype=torch.float64)
    bias[1, -1] = torch.tensor(5.0).log()
    out = attend(query, key, value, bias)
    for row, times in ((0, 1), (1, 5)):
        keys, values = (torch.cat([x[row, :, :6], x[row, :, 6:].repeat(1, times, 1)], dim=1) for x in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(query[row], keys, values)
        torch.testing.assert_close(out[row], expected, rtol=1e-6, atol=1e-7)
