"""Patch on real models of diffusers and transformers: hooks, processors, attention, saving, copying, compiling."""

from __future__ import annotations

import copy
import gc
import importlib.util
import itertools
import threading
import weakref
from pathlib import Path

import pytest
import torch
from pared_hooks import DecoderView, DenoiserView, ParedError, Patch, StepClock, UnsupportedModelError
from torch import nn

_spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


def anatomy(model):
    """All that a patch may touch, of every module: class, attributes (hooks and processors among them), config."""

    def plain(value):
        if isinstance(value, dict):
            return [(key, id(item) if isinstance(item, torch.Tensor) else item) for key, item in value.items()]
        return id(value) if isinstance(value, torch.Tensor) else value

    return [
        (name, type(part), {key: plain(value) for key, value in part.__dict__.items()})
        for name, part in model.named_modules()
    ] + [list(model.state_dict()), str(model.config), getattr(model.config, "_attn_implementation", None)]


def run(model, call):
    with torch.no_grad():
        return model(**call, return_dict=False)[0].clone()


class Denoiser:
    """A tiny UNet; the changes a method makes to it through the doors of diffusers."""

    @staticmethod
    def build():
        model = tiny.unet()
        call = {"sample": tiny.randn(1, 4, 8, 8), "timestep": 500, "encoder_hidden_states": tiny.randn(1, 3, 8)}
        return model, call

    @staticmethod
    def apply(model, owner, number):
        from diffusers.hooks import ModelHook
        from diffusers.models.attention_processor import AttnProcessor

        class Scale(ModelHook):
            def post_forward(self, module, output):
                return output[0] * (1.5 + number), *output[1:]

        class Replace(ModelHook):
            def new_forward(self, module, *args, **kwargs):
                return self.fn_ref.original_forward(*args, **kwargs) * (1 + number)

        view = DenoiserView.of(model)
        with Patch(owner) as patch:
            patch.add_model_hook(view.blocks[1].module, Scale(), f"{owner}.scale")
            patch.wrap_forward(view.blocks[0].module, lambda forward, *a, **k: forward(*a, **k))
            patch.wrap_forward(view.first, lambda forward, x: forward(x) + number)
            patch.add_model_hook(view.first, Replace(), f"{owner}.replace")
            patch.wrap_forward(view.first, lambda forward, x: forward(x) * 2)
            patch.set_processor(view.attentions[0].module, AttnProcessor())
            patch.swap_module(model, "conv_out", nn.Conv2d(8, 4, 3, padding=1))
            StepClock().attach(patch, model)
        return patch


class Language:
    """A tiny Qwen3; the changes a method makes to it through the doors of transformers."""

    @staticmethod
    def build():
        return tiny.decoders()["qwen3"](), {"input_ids": torch.arange(3, 9)[None]}

    @staticmethod
    def apply(model, owner, number):
        from transformers.masking_utils import sdpa_mask

        def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
            groups = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
            output = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, scale=scaling
            )
            return output.transpose(1, 2) * (2.0 + number), None

        view = DecoderView.of(model)
        with Patch(owner) as patch:
            patch.set_attention(view.model, owner, attention, sdpa_mask)
            patch.wrap_forward(view.attention[0], lambda forward, *a, **k: forward(*a, **k))
            patch.swap_module(view.layers[1].mlp, "down_proj", nn.Linear(48, 32, bias=False))
            patch.add_hook(view.layers[0].module, "forward", lambda module, args, output: output * 1.25)
        return patch


@pytest.mark.parametrize("kind", [Denoiser, Language])
@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_three_methods_come_off_in_any_order_without_a_trace(kind, order):
    model, call = kind.build()
    before, plain = anatomy(model), run(model, call)
    patches = [kind.apply(model, f"method{number}", number) for number in range(3)]
    assert not torch.equal(run(model, call), plain)
    for index in order:
        patches[index].remove()
        run(model, call)
    assert anatomy(model) == before
    assert torch.equal(run(model, call), plain)


@pytest.mark.parametrize("kind", [Denoiser, Language])
@pytest.mark.parametrize("gone", range(3))
def test_what_remains_is_what_would_have_been_without_the_removed_one(kind, gone):
    model, call = kind.build()
    torch.manual_seed(3)
    patches = [kind.apply(model, f"method{number}", number) for number in range(3)]
    patches[gone].remove()
    remaining = run(model, call)
    for patch in patches:
        patch.remove()
    torch.manual_seed(3)
    for number in range(3):
        patch = kind.apply(model, f"method{number}", number)
        if number == gone:
            patch.remove()
    assert torch.equal(run(model, call), remaining)


@pytest.mark.parametrize("kind", [Denoiser, Language])
def test_an_exception_inside_apply_leaves_the_model_alone(kind, monkeypatch):
    model, call = kind.build()
    before, plain = anatomy(model), run(model, call)

    def fail(*args, **kwargs):
        raise RuntimeError("half way")

    monkeypatch.setattr(Patch, "swap_module", fail)
    with pytest.raises(RuntimeError, match="half way"):
        kind.apply(model, "method", 1)
    assert anatomy(model) == before
    assert torch.equal(run(model, call), plain)


@pytest.mark.parametrize("kind", [Denoiser, Language])
def test_a_cast_while_patched_is_there_after_removal(kind):
    model, call = kind.build()
    reference = copy.deepcopy(model).to(torch.float64)
    patch = kind.apply(model, "method", 1)
    model.to(torch.float64)
    patch.remove()
    call = {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in call.items()
    }
    assert torch.equal(run(model, call), run(reference, call))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", [Denoiser, Language])
def test_a_deep_copy_is_unpatched_and_independent(kind):
    model, call = kind.build()
    plain = run(model, call)
    patch = kind.apply(model, "method", 1)
    patched = run(model, call)
    clone = copy.deepcopy(model)
    assert torch.equal(run(clone, call), plain)
    assert torch.equal(run(model, call), patched)
    again = kind.apply(clone, "method", 1)
    patch.remove()
    assert not torch.equal(run(clone, call), plain)
    again.remove()
    assert torch.equal(run(clone, call), plain)
    assert torch.equal(run(model, call), plain)


@pytest.mark.parametrize("kind", [Denoiser, Language])
def test_a_patched_model_saves_what_its_state_dict_says_and_loads_as_a_plain_one(kind, tmp_path):
    model, _ = kind.build()
    patch = kind.apply(model, "method", 1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert {name: type(part) for name, part in loaded.named_modules()} == {
        name: type(part) for name, part in model.named_modules()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert "_pared" not in (tmp_path / "config.json").read_text()
    assert "method" not in (tmp_path / "config.json").read_text()
    patch.remove()


def test_two_threads_patch_two_models_without_meeting():
    models = [Language.build() for _ in range(2)]
    plain = [run(*model) for model in models]
    failures = []

    def work(index):
        try:
            for number in range(4):
                patch = Language.apply(models[index][0], "method", number)
                if torch.equal(run(*models[index]), plain[index]):
                    failures.append((index, "not patched"))
                patch.remove()
                if not torch.equal(run(*models[index]), plain[index]):
                    failures.append((index, "not restored"))
        except Exception as error:
            failures.append((index, error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_generate_works_on_a_patched_model():
    model, call = Language.build()
    plain = model.generate(**call, max_new_tokens=4, do_sample=False)
    patch = Language.apply(model, "method", 1)
    model.generate(**call, max_new_tokens=4, do_sample=False)
    patch.remove()
    assert torch.equal(model.generate(**call, max_new_tokens=4, do_sample=False), plain)


# Attention interface


def _registries():
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    return AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping


def test_attention_registers_under_a_free_name_and_goes_on_removal():
    before = [set(registry) for registry in _registries()]
    model, _ = Language.build()
    first, second = Language.apply(model, "method", 1), Language.apply(model, "method", 2)
    assert model.config._attn_implementation == "method-2"
    assert all({"method", "method-2"} <= set(registry) for registry in _registries())
    second.remove()
    assert model.config._attn_implementation == "method"
    first.remove()
    assert [set(registry) for registry in _registries()] == before


def apply_and_drop():
    """Run a model whose attention function refers back to it, and let go of both."""
    from transformers.masking_utils import sdpa_mask
    from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

    model, call = Language.build()
    calls = []

    def attention(module, *args, **kwargs):
        calls.append(type(model))
        return eager_attention_forward(module, *args, **kwargs)

    Patch("method").set_attention(model, "method", attention, sdpa_mask)
    run(model, call)
    assert len(calls) == 2
    return weakref.ref(model)


def test_a_model_dropped_with_its_patch_on_leaves_no_registration():
    gc.collect()  # models of earlier tests must not be dropped in the middle of this one
    before = [set(registry) for registry in _registries()]
    gone = apply_and_drop()
    gc.collect()
    assert gone() is None
    assert [set(registry) for registry in _registries()] == before


def test_only_the_language_part_of_a_vlm_changes_its_attention():
    model = tiny.llava_onevision()
    view = DecoderView.of(model)
    vision = model.config.vision_config._attn_implementation
    patch = Language.apply(model, "method", 1)
    assert model.config.text_config._attn_implementation == "method"
    assert view.model.config is model.config.text_config
    assert model.config.vision_config._attn_implementation == vision
    patch.remove()
    assert model.config.text_config._attn_implementation == vision


def test_attention_of_something_else_than_a_transformers_model_is_refused():
    before = [set(registry) for registry in _registries()]
    patch = Patch("a")

    def apply():
        with patch:
            patch.set_attention(nn.Linear(2, 2), "name", print, print)

    with pytest.raises(UnsupportedModelError, match="can only be set on models of transformers"):
        apply()
    assert [set(registry) for registry in _registries()] == before


# Diffusers hooks


def test_a_second_model_hook_of_the_same_name_is_refused_and_leaves_the_first():
    from diffusers.hooks import ModelHook

    model, _ = tiny.dit()
    Patch("a").add_model_hook(model, ModelHook(), "name")
    with pytest.raises(ParedError, match="already has a model hook"):
        Patch("b").add_model_hook(model, ModelHook(), "name")


def test_a_hook_of_the_user_stays_when_ours_goes():
    from diffusers.hooks import HookRegistry, ModelHook

    class Double(ModelHook):
        def post_forward(self, module, output):
            return (output[0] * 2,)

    model, call = tiny.dit()
    plain = run(model, call)
    patch = Patch("a")
    patch.add_model_hook(model, Double(), "ours")
    HookRegistry.check_if_exists_or_initialize(model).register_hook(Double(), "theirs")
    assert torch.equal(run(model, call), plain * 4)
    patch.remove()
    assert torch.equal(run(model, call), plain * 2)


def test_removing_a_hook_below_one_that_replaces_the_forward_keeps_the_latter():
    from diffusers.hooks import ModelHook

    class Replace(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            return (self.fn_ref.original_forward(*args, **kwargs)[0] * 2,)

    model, call = tiny.dit()
    plain = run(model, call)
    below, above = Patch("a"), Patch("b")
    below.add_model_hook(model, ModelHook(), "below")
    above.add_model_hook(model, Replace(), "above")
    below.remove()
    assert torch.equal(run(model, call), plain * 2)


def test_a_stateful_hook_added_to_a_block_sees_the_cache_context_of_the_model():
    from diffusers.hooks import ModelHook
    from diffusers.hooks.hooks import BaseState, StateManager

    class Stateful(ModelHook):
        _is_stateful = True

        def __init__(self):
            super().__init__()
            self.manager = StateManager(BaseState)

    model, _ = tiny.flux_transformer()
    with model.cache_context("cond"):
        pass
    hook, patch = Stateful(), Patch("a")
    patch.add_model_hook(model.transformer_blocks[0], hook, "a", root=model)
    with model.cache_context("cond"):
        assert hook.manager.context.name == "cond"
    patch.remove()
    with model.cache_context("uncond"):
        assert hook.manager._context is None


def test_a_processor_with_weights_comes_back_in_its_place():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states * self.weight

    from diffusers.models.attention_processor import AttnProcessor

    model, _ = tiny.sd15()
    attention = DenoiserView.of(model).attentions[0].module
    attention.set_processor(Learned())
    keys = list(model.state_dict())
    patch = Patch("a")
    patch.set_processor(attention, AttnProcessor())
    assert "processor" not in attention._modules
    patch.remove()
    assert list(model.state_dict()) == keys
    assert isinstance(attention.processor, Learned)


def test_a_wrapped_scheduler_step_changes_the_run_and_comes_off():
    from diffusers import DDIMScheduler

    def generate():
        torch.manual_seed(0)
        return tiny.run_stable_diffusion(pipeline, steps=2)

    def shorten(step, output, timestep, sample, **kwargs):
        # `eta` arrives only if the pipeline still finds it in the signature.
        seen.append(kwargs["eta"])
        return (step(output, timestep, sample, **kwargs)[0] / 2,)

    pipeline, seen = tiny.stable_diffusion(DDIMScheduler()), []
    before, plain = set(pipeline.scheduler.__dict__), generate()
    patch = Patch("a")
    patch.wrap_method(pipeline.scheduler, "step", shorten)
    assert not torch.equal(generate(), plain)
    assert seen == [0.0, 0.0]
    patch.remove()
    assert torch.equal(generate(), plain)
    assert set(pipeline.scheduler.__dict__) == before


# torch.compile


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_patched_model_compiles_and_a_removal_is_noticed():
    model, call = tiny.dit()
    plain = run(model, call)
    compiled = torch.compile(model, backend="eager")
    patch = Patch("a")
    patch.wrap_forward(model.transformer_blocks[0], lambda forward, *a, **k: forward(*a, **k) * 2)
    patch.wrap_forward(model, lambda forward, *a, **k: (forward(*a, **k)[0] + 1,))
    patched = run(model, call)
    assert not torch.equal(patched, plain)
    torch.testing.assert_close(run(compiled, call), patched)
    patch.remove()
    torch.testing.assert_close(run(compiled, call), plain)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_wrappers_and_attention_functions_compile_into_one_graph():
    model, call = Language.build()
    patch = Patch("method")
    patch.wrap_forward(model.model.layers[0].mlp, lambda forward, x: forward(x) * 2)
    patched = run(model, call)
    torch.testing.assert_close(run(torch.compile(model, backend="eager", fullgraph=True), call), patched)
    other = Language.apply(model, "attention", 1)
    patched = run(model, call)
    torch.testing.assert_close(run(torch.compile(model, backend="eager"), call), patched)
    other.remove()


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_clock_in_a_compiled_denoiser_breaks_the_graph_but_counts():
    model, call = tiny.dit()
    clock, patch = StepClock(), Patch("a")
    clock.attach(patch, model)
    compiled = torch.compile(model, backend="eager")
    for timestep in (900, 800, 700):
        run(compiled, {**call, "timestep": torch.tensor([timestep])})
    assert (clock.run, clock.call) == (0, 2)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"(?i)disable"):
        run(torch.compile(model, backend="eager", fullgraph=True), call)
