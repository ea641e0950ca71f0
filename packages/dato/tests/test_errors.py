"""Failure modes of section 12."""

from __future__ import annotations

import warnings

import pytest
import torch
from dato import FULL, DaToConfig, Policy, PolicyError
from dato.apply import applied, apply
from pared_hooks import AlreadyAppliedError, ConfigError, ConflictError, Patch, UnsupportedModelError

POLICY = Policy((FULL, 1, 0, 2, 1, 0), 0.4)
CONFIG = DaToConfig(policy=POLICY, min_tokens=1)


def test_a_second_apply_is_refused_until_the_first_is_removed(small_unet):
    unet = small_unet()
    handle = apply(unet, CONFIG)
    with pytest.raises(AlreadyAppliedError, match="dato"):
        apply(unet, CONFIG)
    handle.remove()
    apply(unet, CONFIG).remove()


def test_another_method_that_skips_denoiser_calls_is_a_conflict(small_unet):
    unet = small_unet()
    with Patch("other") as patch:
        patch.claim(unet, "denoiser.skip")
    with pytest.raises(ConflictError, match="dato and other"):
        apply(unet, CONFIG)


@pytest.mark.parametrize("name", ["UNetMotionModel", "UNet3DConditionModel", "FluxTransformer2DModel"])
def test_an_unknown_denoiser_is_refused_by_name(name):
    import diffusers

    with torch.device("meta"):
        settings = {
            "UNetMotionModel": {"block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8},
            "UNet3DConditionModel": {"block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8},
            "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
        }[name]
        if name.startswith("UNet"):
            kind = "DownBlockMotion" if name == "UNetMotionModel" else "DownBlock3D"
            settings |= {"down_block_types": (kind,) * 2, "up_block_types": (kind.replace("Down", "Up"),) * 2}
        model = getattr(diffusers, name)(**settings)
    with pytest.raises(UnsupportedModelError, match=f"{name}.*UNet2DConditionModel"):
        apply(model, CONFIG)


def test_an_object_without_a_denoiser_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="dict"):
        apply({}, CONFIG)


def test_a_wrong_config_is_refused_before_the_model_is_touched(small_unet):
    unet = small_unet()
    with pytest.raises(ConfigError, match="DaToConfig"):
        apply(unet, {"policy": "uniform-2"})
    assert "_pared" not in unet.__dict__


def test_a_depth_the_model_does_not_have_names_the_largest(small_unet):
    with pytest.raises(PolicyError, match=r"7.*4"):
        apply(small_unet(), DaToConfig(policy=Policy((FULL, 7))))


def test_a_model_in_training_mode_is_refused_unless_gradients_are_allowed(small_unet):
    unet = small_unet().train()
    with pytest.raises(ConfigError, match="training") as error:
        apply(unet, CONFIG)
    assert error.value.field == "allow_grad"
    apply(unet, CONFIG.replace(allow_grad=True)).remove()


def test_a_call_that_records_gradients_is_refused_unless_allowed(small_unet, calls):
    unet = small_unet()
    with applied(unet, CONFIG), pytest.raises(ConfigError, match="no_grad"):
        unet(*calls(1)[0])
    with applied(unet, CONFIG.replace(allow_grad=True)):
        unet(*calls(1)[0]).sample.sum().backward()


@torch.no_grad()
def test_an_error_inside_the_denoiser_lets_the_next_call_start_a_clean_run(small_unet, calls):
    unet = small_unet()
    inputs = calls(6)
    with applied(unet, CONFIG) as handle:
        expected = [unet(*call).sample for call in inputs]
        handle.reset()
        unet(*inputs[0])
        with pytest.raises(RuntimeError):
            unet(inputs[1][0], inputs[1][1], inputs[1][2][..., :5])
        outputs = [unet(*call).sample for call in inputs]
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))


@torch.no_grad()
def test_a_prediction_that_is_not_finite_warns_once_and_counts_as_no_dynamics(small_unet, calls):
    unet = small_unet()
    inputs, broken = calls(6), calls(6)
    broken[1][0][0, 0, 3, 3] = float("nan")
    broken[3][0][0, 0, 3, 3] = float("inf")
    with applied(unet, CONFIG) as handle:
        expected = [unet(*call).sample for call in inputs]
        handle.reset()
        with pytest.warns(UserWarning, match="NaN") as warned:
            outputs = [unet(*call).sample for call in broken]
        assert len(warned) == 1
        assert not outputs[1][0].isfinite().all()
        assert all(output[1].isfinite().all() for output in outputs)
        mended = [unet(*call).sample for call in inputs]
    assert all(torch.equal(one, other) for one, other in zip(mended, expected, strict=True))


@torch.no_grad()
def test_a_patch_larger_than_the_token_grid_is_refused_at_the_call(small_unet, calls):
    unet = small_unet()
    config = DaToConfig(policy=POLICY, patch=(8, 8), min_tokens=1)
    with applied(unet, config), pytest.raises(ValueError, match=r"patch.*\(4, 16\)"):
        unet(*calls(1, (4, 16))[0])


@torch.no_grad()
def test_a_self_attention_mask_of_another_shape_is_refused_by_name(small_unet, calls):
    unet = small_unet()
    with applied(unet, CONFIG), pytest.raises(ValueError, match=r"attention_mask of shape \(2, 1, 9\)"):
        unet(*calls(1)[0], attention_mask=torch.ones(2, 9))


def test_timing_and_counts_start_from_zero_after_reset(small_unet, calls):
    unet = small_unet()
    with torch.no_grad(), applied(unet, CONFIG) as handle:
        handle.timing = True
        for call in calls(6):
            unet(*call)
        assert set(handle.stats()["seconds"]) == {"full", "depth-1", "depth-2", "skip"}
        handle.reset()
        assert handle.stats()["calls"] == {}


def test_start_run_refuses_less_than_one_call(small_unet):
    with applied(small_unet(), CONFIG) as handle, pytest.raises(ConfigError, match="num_calls"):
        handle.start_run(num_calls=0)


@torch.no_grad()
def test_a_model_cast_between_runs_starts_with_empty_stores(small_unet, calls):
    unet = small_unet()
    with applied(unet, CONFIG), warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in calls(6):
            unet(*call)
        unet.to(torch.float64)
        outputs = [unet(sample.double(), timestep, text.double()).sample for sample, timestep, text in calls(6)]
    assert all(output.dtype == torch.float64 for output in outputs)
