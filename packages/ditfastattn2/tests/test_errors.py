"""What goes wrong goes wrong early, by name, and leaves the model as it was."""

from __future__ import annotations

import ditfastattn2
import pytest
import torch
from dfa_models import MODELS, Tiny
from ditfastattn2 import Config, GradientError, PlanMismatch
from ditfastattn2.adapters.base import sites_of
from pared_hooks import (
    AlreadyAppliedError,
    ConfigError,
    ConflictError,
    DenoiserView,
    ParedError,
    Patch,
    UnsupportedModelError,
)


@pytest.fixture
def tiny() -> Tiny:
    return MODELS["flux"]()


def untouched(model: torch.nn.Module) -> bool:
    """Whether nothing of a patch is left on any module or processor."""
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    return not any("_pared" in one.__dict__ for one in (*model.modules(), *processors))


def test_an_unknown_architecture_is_refused_with_those_that_are_known(plan_of, tiny):
    plan = plan_of(tiny)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="Supported"):
        ditfastattn2.apply(model.eval(), plan)
    from diffusers import DiTTransformer2DModel

    dit = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    with pytest.raises(UnsupportedModelError, match="wan"):
        ditfastattn2.apply(dit.eval(), plan)
    assert untouched(dit)


def test_an_unknown_processor_is_refused(plan_of, tiny):
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor

    tiny = MODELS["flux2"]()
    plan = plan_of(tiny)
    tiny.model.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor())
    with pytest.raises(UnsupportedModelError, match="Flux2KVAttnProcessor"):
        ditfastattn2.apply(tiny.model, plan)
    assert untouched(tiny.model)


@torch.no_grad()
def test_cached_keys_of_reference_pictures_are_refused(plan_of):
    tiny = MODELS["flux2"]()
    with ditfastattn2.applied(tiny.model, plan_of(tiny)):
        call = tiny.arguments(tiny.sample, torch.ones(1), tiny.text)
        with pytest.raises(UnsupportedModelError, match="kv_cache_mode"):
            tiny.model(**call, kv_cache_mode="extract", num_ref_tokens=4)
    assert untouched(tiny.model)


def test_a_plan_of_another_model_is_refused_before_anything_is_patched(plan_of, tiny):
    plan = plan_of(MODELS["sd3"]())
    with pytest.raises(PlanMismatch, match="class FluxTransformer2DModel") as caught:
        ditfastattn2.apply(tiny.model, plan)
    assert len(caught.value.differences) > 1
    assert untouched(tiny.model)


def test_what_is_no_plan_is_refused(tiny):
    with pytest.raises(ConfigError, match="plan"):
        ditfastattn2.apply(tiny.model, {"delta": 1})


@torch.no_grad()
def test_a_second_apply_is_refused_and_the_first_goes_on(plan_of, tiny):
    plan = plan_of(tiny)
    with ditfastattn2.applied(tiny.model, plan):
        expected = tiny.denoise()
        with pytest.raises(AlreadyAppliedError):
            ditfastattn2.apply(tiny.model, plan)
        assert tiny.denoise().equal(expected)
    assert untouched(tiny.model)


def test_another_method_that_owns_attention_outputs_is_a_conflict(plan_of, tiny):
    site = sites_of(DenoiserView.of(tiny.model))[1]
    other = Patch("another")
    other.claim(site.module, "attention.output")
    with pytest.raises(ConflictError, match="another"):
        ditfastattn2.apply(tiny.model, plan_of(tiny))
    other.remove()
    assert untouched(tiny.model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options", "hook"),
    [
        ("PyramidAttentionBroadcastConfig", {"spatial_attention_block_skip_range": 2}, "pyramid_attention_broadcast"),
        ("FasterCacheConfig", {"is_guidance_distilled": True}, "faster_cache_block"),
        ("TaylorSeerCacheConfig", None, "taylorseer_cache"),
    ],
)
def test_a_cache_of_attention_outputs_is_a_conflict_before_and_after(kind, options, hook, plan_of, tiny):
    import diffusers

    timed = {} if options is None else options | {"current_timestep_callback": lambda: 500}
    config = getattr(diffusers, kind)(**timed)
    plan = plan_of(tiny)
    tiny.model.enable_cache(config)
    with pytest.raises(ConflictError, match=hook):
        ditfastattn2.apply(tiny.model, plan)
    tiny.model.disable_cache()
    assert untouched(tiny.model)
    with ditfastattn2.applied(tiny.model, plan):
        tiny.model.enable_cache(config)
        with pytest.raises(ConflictError, match=hook):
            tiny.denoise()
        tiny.model.disable_cache()
        tiny.denoise()


def test_training_mode_and_gradients_are_refused_unless_allowed(plan_of, tiny):
    plan = plan_of(tiny, "a")
    tiny.model.train()
    with pytest.raises(GradientError, match="training mode"):
        ditfastattn2.apply(tiny.model, plan)
    assert untouched(tiny.model)
    tiny.model.eval()
    with ditfastattn2.applied(tiny.model, plan), pytest.raises(RuntimeError, match="no_grad"):
        tiny.denoise()
    plain = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan, allow_grad=True) as handle:
        result = tiny.denoise()
        assert handle.stats()["dense"] == {"gradients": 4}
    assert result.equal(plain)
    result.sum().backward()
    assert tiny.model.x_embedder.weight.grad is not None


@torch.no_grad()
def test_parallelism_is_refused_before_and_after(plan_of, tiny):
    plan = plan_of(tiny)
    tiny.model._parallel_config = object()
    with pytest.raises(UnsupportedModelError, match="parallelism"):
        ditfastattn2.apply(tiny.model, plan)
    del tiny.model._parallel_config
    assert untouched(tiny.model)
    with ditfastattn2.applied(tiny.model, plan):
        tiny.model._parallel_config = object()
        with pytest.raises(UnsupportedModelError, match="parallelism"):
            tiny.denoise()
        del tiny.model._parallel_config


@torch.no_grad()
def test_a_processor_that_was_changed_in_between_is_an_error(plan_of, tiny):
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    with ditfastattn2.applied(tiny.model, plan_of(tiny)):
        attention = tiny.model.transformer_blocks[0].attn
        ours = attention.processor
        attention.set_processor(FluxAttnProcessor())
        with pytest.raises(ParedError, match="replaced after"):
            tiny.denoise()
        attention.set_processor(ours)


@torch.no_grad()
def test_a_mask_that_is_no_text_padding_runs_that_call_in_full_with_one_warning(plan_of):
    tiny = MODELS["qwen-image"]()
    original = tiny.arguments

    def arguments(x, t, text):
        call = original(x, t, text)
        call["encoder_hidden_states_mask"] = torch.tensor([[1, 0, 1, 1, 0, 1]] * 2)
        return call

    tiny.arguments = arguments
    plain = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan_of(tiny, "a")) as handle:
        with pytest.warns(UserWarning, match="padding") as caught:
            result = tiny.denoise()
        assert len(caught) == 1
        assert handle.stats()["dense"] == {"padding is not behind the text": 4}
    assert result.equal(plain)


@torch.no_grad()
def test_masks_given_to_attention_itself_count_if_they_are_text_padding(plan_of):
    tiny = MODELS["flux"]()
    plan = plan_of(tiny, "b")
    original = tiny.arguments
    keep = torch.ones(1, 70, dtype=torch.bool)
    keep[:, 4:6] = False

    def with_mask(mask):
        def arguments(x, t, text):
            return original(x, t, text) | {"joint_attention_kwargs": {"attention_mask": mask}}

        return arguments

    tiny.arguments = with_mask(keep)
    plain = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan) as handle:
        padded = tiny.denoise()
        assert handle.stats()["dense"] == {}
        assert handle.stats()["removed"] > 0
    shorter = MODELS["flux"]()
    shorter.text = shorter.text[:, :4]
    assert (padded - plain).abs().max() > 1e-3
    keep = keep.clone()
    keep[:, 30] = False
    tiny.arguments = with_mask(keep)
    plain = tiny.denoise()
    with ditfastattn2.applied(tiny.model, plan) as handle:
        with pytest.warns(UserWarning, match="mask"):
            assert tiny.denoise().equal(plain)
        assert sum(handle.stats()["dense"].values()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": -0.1}, "delta must be >= 0"),
        ({"delta": float("inf")}, "delta must be >= 0"),
        ({"coef": 0.0}, "coef"),
        ({"methods": ()}, "methods"),
        ({"methods": ("cached", "cached")}, "methods"),
        ({"methods": ("arrow:1/8", "window:1/8")}, "'window:1/8' is not valid; known: cached"),
        ({"methods": ("full",)}, "methods"),
        ({"first_full_steps": 0}, "first_full_steps"),
        ({"last_full_steps": -1}, "last_full_steps"),
        ({"min_cache_steps": 0}, "min_cache_steps"),
        ({"dense_above": 0.0}, "dense_above"),
        ({"dense_above": 1.1}, "dense_above"),
        ({"block": (128, 48)}, "block"),
        ({"block": (8, 64)}, "block"),
        ({"backend": "flash"}, "backend"),
        ({"cache_dtype": "int8"}, "cache_dtype"),
        ({"cache_device": "disk"}, "cache_device"),
    ],
)
def test_wrong_configurations_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)


def test_a_backend_that_is_missing_is_told_at_apply(plan_of, tiny, monkeypatch):
    from pared_kernels import dispatch

    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    plan = plan_of(tiny, backend="triton")
    with pytest.raises(RuntimeError, match="triton"):
        ditfastattn2.apply(tiny.model, plan)
    assert untouched(tiny.model)
