"""DenoiserView on the real classes of diffusers: every fact is compared with what a forward shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from pared_hooks import ConfigError, DenoiserView, Grid, UnsupportedModelError, register_denoiser_family
from torch import nn

_spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

FAMILIES = tiny.denoisers()
EXPECTED = {  # family, architecture, number of attentions by kind
    "sd15": ("unet", "unet2d-condition", {"self": 10, "cross": 10}),
    "sdxl": ("unet", "unet2d-condition", {"self": 18, "cross": 18}),
    "dit": ("dit", "dit", {"self": 2}),
    "pixart": ("dit", "pixart", {"self": 2, "cross": 2}),
    "sd3": ("mmdit", "sd3", {"joint": 2, "self": 1}),
    "flux": ("mmdit", "flux", {"joint": 2}),
    "flux2": ("mmdit", "flux2", {"joint": 2}),
    "qwen-image": ("mmdit", "qwen-image", {"joint": 2}),
    "wan": ("dit", "wan", {"self": 1, "cross": 1}),
    "hunyuan-video": ("mmdit", "hunyuan-video", {"joint": 2}),
    "hunyuan-video-15": ("mmdit", "hunyuan-video-15", {"joint": 2}),
    "cogvideox": ("mmdit", "cogvideox", {"joint": 2}),
}


@pytest.fixture(params=list(FAMILIES))
def case(request):
    model, call = FAMILIES[request.param]()
    return request.param, model, call, DenoiserView.of(model)


def keys_seen(model, call, monkeypatch):
    """The keys of every attention of one forward, (batch, heads, tokens, head_dim), by attention module."""
    import torch.nn.functional as F

    plain, seen, running = F.scaled_dot_product_attention, {}, []

    def record(query, key, value, *args, **kwargs):
        if running:
            seen.setdefault(running[-1], []).append((query, key))
        return plain(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    handles = []
    for name, module in model.named_modules():
        if hasattr(module, "set_processor"):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
            handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    with torch.no_grad():
        model(**call)
    for handle in handles:
        handle.remove()
    monkeypatch.undo()
    return {name: calls[0] for name, calls in seen.items()}


def test_family_and_attention_kinds(case):
    name, model, _, view = case
    family, architecture, kinds = EXPECTED[name]
    assert (view.family, view.architecture) == (family, architecture)
    counted = {}
    for site in view.attentions:
        counted[site.kind] = counted.get(site.kind, 0) + 1
    assert counted == kinds
    assert view.model is model


def test_names_are_paths_of_the_modules(case):
    _, model, _, view = case
    for part in (*view.blocks, *view.attentions):
        assert model.get_submodule(part.name) is part.module
    assert [block.index for block in view.blocks] == list(range(len(view.blocks)))
    assert all(site.name.startswith(view.blocks[site.block].name) for site in view.attentions)


def test_every_attention_over_picture_tokens_is_listed(case, monkeypatch):
    _, model, call, view = case
    seen = keys_seen(model, call, monkeypatch)
    # The token refiner of HunyuanVideo reads text alone.
    assert {site.name for site in view.attentions} == {key for key in seen if "refiner" not in key}


def test_spans_and_grid_agree_with_the_sequence_of_a_forward(case, monkeypatch):
    _, model, call, view = case
    seen = keys_seen(model, call, monkeypatch)
    shape = call[view.sample_name].shape
    num_text = view.num_text_tokens(**call)
    for site in view.attentions:
        query, key = seen[site.name]
        spans = view.spans(site, shape, num_text, **call)
        total = spans.grid.num_tokens + (num_text if site.kind == "joint" else 0)
        assert query.shape[-2] == total, site.name
        assert key.shape[-2] == (num_text if site.kind == "cross" else total), site.name
        assert (spans.vision.stop - spans.vision.start) == spans.grid.num_tokens


@pytest.mark.parametrize("name", [name for name, (family, *_) in EXPECTED.items() if family == "mmdit"])
def test_other_text_changes_exactly_the_text_span_of_the_first_joint_attention(name, monkeypatch):
    model, call = FAMILIES[name]()
    view = DenoiserView.of(model)
    site = view.attentions[0]
    _, before = keys_seen(model, call, monkeypatch)[site.name]
    texts = {name: call[name] for name in (view.text_name, *view.more_text)}
    other = call | {name: text + 1 + torch.arange(text.shape[-1]) for name, text in texts.items()}
    _, after = keys_seen(model, other, monkeypatch)[site.name]
    changed = (before - after).abs().amax(dim=(0, 1, 3)) > 1e-6
    text = view.spans(site, call[view.sample_name].shape, view.num_text_tokens(**call), **call).text
    assert changed[text].all()
    assert changed.sum() == text.stop - text.start


@pytest.mark.parametrize("name", [name for name, (family, *_) in EXPECTED.items() if family != "unet"])
def test_streams_of_transformer_blocks_are_in_the_order_of_their_forward(name):
    model, call = FAMILIES[name]()
    view = DenoiserView.of(model)
    num_text = view.num_text_tokens(**call)
    num_vision = view.grid(call[view.sample_name].shape, **call).num_tokens
    seen = {}

    def record(module, args, kwargs, output):
        streams = (*args, *kwargs.values())
        seen[module] = (streams[: len(block_of[module].inputs)], output if isinstance(output, tuple) else (output,))

    block_of = {block.module: block for block in view.blocks}
    handles = [block.module.register_forward_hook(record, with_kwargs=True) for block in view.blocks]
    with torch.no_grad():
        model(**call)
    for handle in handles:
        handle.remove()
    length = {"vision": num_vision, "text": num_text, "joint": num_vision + num_text}
    for block in view.blocks:
        inputs, outputs = seen[block.module]
        assert [tensor.shape[1] for tensor in inputs] == [length[stream] for stream in block.inputs]
        assert len(outputs) == len(block.outputs)
        for tensor, stream in zip(outputs, block.outputs, strict=True):
            # The last block of SD3 drops the text.
            assert tensor is None or tensor.shape[1] == length[stream]


def test_bind_names_positional_arguments(case):
    _, _, call, view = case
    names = list(view.bind((), call))
    assert {view.sample_name, view.timestep_name} <= set(names)
    assert view.bind((1,), {"return_dict": False}) == {view.sample_name: 1, "return_dict": False}


def test_blocks_of_a_unet_know_their_resolution():
    model, call = tiny.sd15()
    view = DenoiserView.of(model)
    sizes = {}
    handles = [
        site.module.register_forward_pre_hook(
            lambda module, args, kwargs, name=site.name: sizes.__setitem__(name, args[0].shape[1]), with_kwargs=True
        )
        for site in view.attentions
    ]
    with torch.no_grad():
        model(**{**call, "sample": tiny.randn(1, 4, 15, 9), "encoder_hidden_states": tiny.randn(1, 5, 8)})
    for handle in handles:
        handle.remove()
    assert sizes == {site.name: view.grid((1, 4, 15, 9), site.level).num_tokens for site in view.attentions}


def test_a_pipeline_is_viewed_through_its_denoiser():
    from diffusers import DDIMScheduler

    pipeline = tiny.stable_diffusion(DDIMScheduler())
    assert DenoiserView.of(pipeline).model is pipeline.unet


def test_packed_tokens_without_what_the_call_says_are_an_error():
    model, call = tiny.flux_transformer()
    with pytest.raises(ConfigError, match="pass img_ids"):
        DenoiserView.of(model).grid(call["hidden_states"].shape)
    assert DenoiserView.of(model).grid(call["hidden_states"].shape, **call) == Grid(1, 4, 6)


def test_an_unknown_denoiser_names_what_was_found_and_what_to_do():
    class MyDenoiser(nn.Module):
        pass

    with pytest.raises(UnsupportedModelError) as caught:
        DenoiserView.of(MyDenoiser())
    message = str(caught.value)
    assert "MyDenoiser is not supported" in message
    assert "sd3 (SD3Transformer2DModel)" in message
    assert "register_denoiser_family" in message


def test_something_that_is_no_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="dict is neither a denoiser nor a pipeline"):
        DenoiserView.of({})


def test_a_family_can_be_registered_once(monkeypatch):
    from pared_hooks.views import denoiser

    monkeypatch.setattr(denoiser, "_families", dict(denoiser._families))

    class MyDenoiser(nn.Module):
        pass

    register_denoiser_family("mine", ("MyDenoiser",), lambda model: model)
    model = MyDenoiser()
    assert DenoiserView.of(model) is model
    with pytest.raises(ConfigError, match="registered already"):
        register_denoiser_family("mine", ("MyDenoiser",), lambda model: model)
