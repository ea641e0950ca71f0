"""DecoderView on the real classes of transformers: the parts, put together by hand, compute what the model computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from pared_hooks import ConfigError, DecoderFamily, DecoderView, UnsupportedModelError, register_decoder_family
from torch import nn

_spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

DECODERS = tiny.decoders()
FAMILY = {"llava-onevision": "qwen2", "internvl": "qwen2"}
MULTIMODAL = {"llava-onevision": True, "internvl": True, "qwen2_5_vl": False, "qwen3_vl": False}  # own projector?


@pytest.fixture(params=list(DECODERS))
def case(request):
    model = DECODERS[request.param]()
    return request.param, model, DecoderView.of(model)


def test_the_view_names_family_sizes_and_parts(case):
    name, model, view = case
    assert view.family == FAMILY.get(name, name)
    assert len(view.layers) == 2
    assert (view.num_heads, view.num_key_value_heads, view.num_key_value_groups) == (4, 2, 2)
    for layer in view.layers:
        assert layer.projections["query"].weight.shape == (view.num_heads * view.head_dim, view.hidden_size)
        assert layer.projections["key"].weight.shape == (view.num_key_value_heads * view.head_dim, view.hidden_size)
        assert layer.projections["value"].weight.shape == layer.projections["key"].weight.shape
        assert layer.projections["output"].weight.shape == (view.hidden_size, view.num_heads * view.head_dim)
        assert layer.mlp_projections["down"].weight.shape == (view.hidden_size, 48)
        assert layer.attention.layer_idx == layer.index
        assert model.get_submodule(layer.name) is layer.module
    assert model.get_submodule(view.name) is view.model
    assert view.attention == tuple(layer.attention for layer in view.layers)


def test_a_vision_tower_is_found_and_projected(case):
    name, _, view = case
    assert (view.vision is not None) == (name in MULTIMODAL)
    assert (view.projector is not None) == MULTIMODAL.get(name, False)


def test_the_parts_compute_the_logits_of_the_model(case):
    """Runs embed, rotary, layers, norm and head of the view; the layer body is rebuilt from projections and norms."""
    _, model, view = case
    ids = torch.randint(3, 59, (1, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        hidden = view.embed(ids)
        positions = torch.arange(7)[None]
        for layer in view.layers:
            hidden = _layer(view, layer, hidden, positions)
        logits = view.head(view.norm(hidden))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def _layer(view, layer, hidden, positions):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    if view.family == "gemma3":
        cos, sin = view.rotary(hidden, positions, layer.layer_type)
    elif view.family in ("qwen2_5_vl", "qwen3_vl"):
        # For text the three position axes agree, so that the sections of multimodal RoPE all say the same.
        cos, sin = view.rotary(hidden, positions[None].expand(3, 1, -1))
        cos, sin = (table[0] if table.ndim == 4 else table for table in (cos, sin))
    else:
        cos, sin = view.rotary(hidden, positions)
    normed = layer.norms["attention"](hidden)
    heads = {}
    for role in ("query", "key", "value"):
        heads[role] = layer.projections[role](normed).unflatten(-1, (-1, view.head_dim))
        if role in layer.norms:
            heads[role] = layer.norms[role](heads[role])
        heads[role] = heads[role].transpose(1, 2)
    query, key = apply_rotary_pos_emb(heads["query"], heads["key"], cos, sin)
    key, value = (tensor.repeat_interleave(view.num_key_value_groups, 1) for tensor in (key, heads["value"]))
    distance = torch.arange(7)[:, None] - torch.arange(7)
    mask = distance >= 0
    if layer.sliding_window is not None:
        mask &= distance < layer.sliding_window
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=layer.attention.scaling
    )
    output = layer.projections["output"](output.transpose(1, 2).flatten(2))
    after = layer.norms.get("after_attention", nn.Identity())
    hidden = hidden + after(output)
    mlp = layer.norms.get("after_mlp", nn.Identity())
    return hidden + mlp(layer.mlp(layer.norms["mlp"](hidden)))


def test_sliding_layers_know_their_window():
    view = DecoderView.of(tiny.gemma3())
    assert [layer.layer_type for layer in view.layers] == ["sliding_attention", "full_attention"]
    assert [layer.sliding_window for layer in view.layers] == [4, None]


def test_a_bare_decoder_has_no_head():
    model = DECODERS["llama"]()
    view = DecoderView.of(model.model)
    assert view.head is None
    assert view.name == ""
    assert view.model is model.model
    assert view.layers[1].name == "layers.1"


def test_an_unknown_model_names_what_was_found_and_what_to_do():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10, n_positions=8))
    with pytest.raises(UnsupportedModelError) as caught:
        DecoderView.of(model)
    message = str(caught.value)
    assert "GPT2Model is not supported" in message
    assert "llama (LlamaModel)" in message
    assert "register_decoder_family" in message


def test_a_registered_family_is_read(monkeypatch):
    from pared_hooks.views import decoder

    monkeypatch.setattr(decoder, "_families", {})
    model = DECODERS["llama"]()
    with pytest.raises(UnsupportedModelError):
        DecoderView.of(model)
    register_decoder_family(DecoderFamily("mine", ("LlamaModel",)))
    assert DecoderView.of(model).family == "mine"
    with pytest.raises(ConfigError, match="registered already"):
        register_decoder_family(DecoderFamily("mine", ("LlamaModel",)))


def test_a_family_with_a_wrong_attribute_name_says_which(monkeypatch):
    from pared_hooks.views import decoder

    monkeypatch.setattr(decoder, "_families", {})
    register_decoder_family(DecoderFamily("mine", ("LlamaModel",), attention="attn"))
    with pytest.raises(UnsupportedModelError, match="LlamaDecoderLayer has no module 'attn'"):
        DecoderView.of(DECODERS["llama"]())
