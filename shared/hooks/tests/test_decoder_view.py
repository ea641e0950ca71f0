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
MULTIMODAL = {  # own projector?
    "llava-onevision": True,
    "internvl": True,
    "qwen2_5_vl": False,
    "qwen3_vl": False,
    "gemma3-vl": True,
    "smolvlm": True,
    "llava-next-video": True,
    "video-llama3": True,
    "qwen2_vl": False,
    "qwen3_vl_moe": False,
}
MORE = tiny.more_decoders()


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


@pytest.fixture(params=[*DECODERS, *MORE])
def any_case(request):
    model = (DECODERS.get(request.param) or MORE[request.param][0])()
    return request.param, model, DecoderView.of(model)


def test_a_vision_tower_is_found_and_projected(any_case):
    name, _, view = any_case
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


ORDER = (  # within a layer; what a family lacks is left out
    ("norm", "attention"),
    ("projection", "query"),
    ("projection", "qkv"),
    ("norm", "query"),
    ("projection", "output"),
    ("norm", "after_attention"),
    ("norm", "mlp"),
    ("mlp", "gate_up"),
    ("mlp", "gate"),
    ("mlp", "down"),
    ("norm", "after_mlp"),
)


def test_the_parts_run_in_the_order_of_their_roles(any_case):
    name, model, view = any_case
    assert view.family == (MORE[name][1] if name in MORE else FAMILY.get(name, name))
    ran, handles = [], []

    def watch(part, key):
        handles.append(part.register_forward_hook(lambda module, args, output: ran.append((*key, output))))

    watch(view.embed, ("embed", ""))
    watch(view.norm, ("last norm", ""))
    watch(view.head, ("head", ""))
    for layer in view.layers:
        for kind, parts in (("norm", layer.norms), ("projection", layer.projections), ("mlp", layer.mlp_projections)):
            for role, part in parts.items():
                watch(part, (kind, role))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 10)[None])
    for handle in handles:
        handle.remove()
    expected = [("embed", "")]
    for layer in view.layers:
        listed = {("norm", role) for role in layer.norms} | {("projection", role) for role in layer.projections}
        listed |= {("mlp", role) for role in layer.mlp_projections}
        expected += [key for key in ORDER if key in listed]
    expected += [("last norm", ""), ("head", "")]
    assert [(kind, role) for kind, role, _ in ran if (kind, role) in expected] == expected
    widths = {"query": view.num_heads, "key": view.num_key_value_heads, "value": view.num_key_value_heads}
    widths["qkv"] = sum(widths.values())
    for kind, role, output in ran:
        if kind == "projection":
            heads = widths.get(role)
            # Its queries come with a gate each, from the same projection.
            heads = 2 * heads if heads and name == "qwen3_5" and role == "query" else heads
            assert output.shape[-1] == (heads * view.head_dim if heads else view.hidden_size)


def test_a_mixture_of_experts_has_no_single_gate_up_and_down():
    view = DecoderView.of(MORE["qwen3_moe"][0]())
    assert [sorted(layer.mlp_projections) for layer in view.layers] == [[], ["down", "gate", "up"]]


def test_sliding_layers_know_their_window():
    view = DecoderView.of(tiny.gemma3())
    assert [layer.layer_type for layer in view.layers] == ["sliding_attention", "full_attention"]
    assert [layer.sliding_window for layer in view.layers] == [4, None]


def test_a_layer_of_linear_attention_has_projections_of_its_own_kind():
    view = DecoderView.of(tiny.qwen3_5())
    first, second = view.layers
    assert first.layer_type == "linear_attention"
    assert first.attention is first.module.linear_attn
    assert dict(first.projections) == {}
    mixer = first.attention
    linears = {module for module in mixer.modules() if isinstance(module, nn.Linear)}
    assert set(first.linear_projections.values()) == linears
    assert first.linear_projections["output"] is mixer.out_proj
    assert dict(second.linear_projections) == {}
    assert sorted(first.norms) == ["attention", "mlp"]
    assert second.attention is second.module.self_attn
    assert "query" in second.norms


def test_a_layer_that_takes_keys_from_an_earlier_one_has_none_of_its_own():
    view = DecoderView.of(tiny.gemma4())
    assert ["key" in layer.projections for layer in view.layers] == [True, True, False, False]
    assert all({"query", "output"} <= set(layer.projections) for layer in view.layers)


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
