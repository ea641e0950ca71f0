"""DaTo in stock diffusers pipelines built from tiny components (acceptance 7)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from dato import FULL, DaToConfig, Policy
from dato.apply import applied

POLICY = Policy((FULL, 1, 0, 2, FULL, 1, 1, 0, FULL, 3), 0.4)
CONFIG = DaToConfig(policy=POLICY, min_tokens=16)

KINDS = (
    "StableDiffusion",
    "StableDiffusionXL",
    "StableDiffusionImg2Img",
    "StableDiffusionInpaint",
    "StableDiffusionControlNet",
    "StableDiffusionAdapter",
    "IPAdapter",
)
SCHEDULERS = ("DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete")
QUICK = {("StableDiffusion", scheduler) for scheduler in SCHEDULERS} | {(kind, "DDIM") for kind in KINDS}
QUICK |= {("StableDiffusionImg2Img", "HeunDiscrete"), ("StableDiffusionImg2Img", "PNDM")}


def count_calls(pipe, run):
    """Denoiser calls of an unpatched run."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    calls = []
    hook = denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    pipe(**run)
    hook.remove()
    return len(calls)


def planned(pipe, num_calls):
    """Actions of a run that makes the last `num_calls` of the scheduler's calls."""
    total = len(pipe.scheduler.timesteps)
    return Counter(POLICY.for_run(total, total - num_calls).actions())


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        pytest.param(kind, scheduler, marks=() if (kind, scheduler) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for scheduler in SCHEDULERS
    ],
)
def test_a_run_makes_the_calls_that_the_policy_plans(pipeline, kind, scheduler):
    pipe, run = pipeline(kind, f"{scheduler}Scheduler")
    num_calls = count_calls(pipe, run)
    with applied(pipe, CONFIG) as handle:
        for repeat in (1, 2):
            images = pipe(**run).images
            expected = {action: count * repeat for action, count in planned(pipe, num_calls).items()}
            assert handle.stats()["calls"] == expected
    assert torch.isfinite(images).all()


def test_img2img_uses_the_end_of_the_policy(pipeline):
    pipe, run = pipeline("StableDiffusionImg2Img", steps=10)
    with applied(pipe, CONFIG) as handle:
        pipe(**run)
        # The last six of ten calls, the first of them FULL: F 1 1 0 F 3.
        assert handle.stats()["calls"] == {"full": 2, "depth-1": 2, "skip": 1, "depth-3": 1}


def test_a_changed_number_of_steps_resamples_the_policy(pipeline):
    pipe, run = pipeline(steps=10)
    with applied(pipe, CONFIG) as handle:
        pipe(**run)
        assert handle.stats()["calls"] == POLICY.actions()
        handle.reset()
        pipe(**{**run, "num_inference_steps": 5})
        assert handle.stats()["calls"] == POLICY.for_run(5).actions()


def test_latent_consistency_models_run(pipeline):
    pipe, run = pipeline("LatentConsistencyModel", "LCMScheduler", steps=6)
    with applied(pipe, CONFIG) as handle:
        pipe(**run)
        assert handle.stats()["calls"] == POLICY.for_run(6).actions()


def test_a_dit_pipeline_runs(pipeline):
    pipe, run = pipeline("DiT", steps=10)
    with applied(pipe, CONFIG) as handle:
        images = pipe(**run).images
        stats = handle.stats()
    assert stats["calls"] == POLICY.actions()
    assert set(stats["tokens_kept"]) == {f"transformer_blocks.{index}" for index in range(3)}
    assert images.shape[-1] == 16


def test_guidance_off_and_odd_batches_run_unaligned(pipeline):
    pipe, run = pipeline(batch=3)
    run |= {"guidance_scale": 1.0}
    with applied(pipe, CONFIG) as handle:
        pipe(**run)
        assert handle.stats()["tokens_kept"]


def test_skipped_calls_do_not_compute_the_controlnet(pipeline):
    pipe, run = pipeline("StableDiffusionControlNet", steps=10)
    computed = []
    pipe.controlnet.conv_in.register_forward_pre_hook(lambda *_: computed.append(1))
    with applied(pipe, CONFIG) as handle:
        pipe(**run)
        assert handle.stats()["controlnet"] == {"computed": 8, "reused": 2}
    assert len(computed) == 8


def test_reuse_controlnet_computes_it_at_full_calls_alone(pipeline):
    pipe, run = pipeline("StableDiffusionControlNet", steps=10)
    with applied(pipe, CONFIG.replace(reuse_controlnet=True)) as handle:
        pipe(**run)
        assert handle.stats()["controlnet"] == {"computed": 3, "reused": 7}


def test_a_skipped_controlnet_changes_no_image(pipeline):
    """Calls of depth 0 read no residual, so an uncounted, always computed ControlNet gives the same."""
    pipe, run = pipeline("StableDiffusionControlNet", steps=10)

    def sample(target):
        run["generator"].manual_seed(2)
        with applied(target, CONFIG.replace(cfg_groups=2)) as handle:
            if target is not pipe:
                handle.start_run(num_calls=10)
            return pipe(**run).images

    assert torch.equal(sample(pipe), sample(pipe.unet))


def test_features_of_a_t2i_adapter_do_not_pile_up_in_the_stores(pipeline):
    """The UNet adds them in place; a policy of the deepest cache must give the same twice."""
    pipe, run = pipeline("StableDiffusionAdapter", steps=10)
    config = DaToConfig(policy=Policy((FULL, 4, 3, 4, 4, 4, 4, 4, 4, 4), 0.0))
    results = []
    with applied(pipe, config):
        for _ in range(2):
            run["generator"].manual_seed(2)
            results.append(pipe(**run).images)
    assert torch.equal(*results)


def test_freeu_scales_a_stored_feature_once(small_unet, calls):
    """FreeU changes hidden states in place; with a repeated input every cached call gives the FULL call's output."""
    unet = small_unet()
    unet.enable_freeu(s1=0.9, s2=0.5, b1=1.4, b2=1.6)
    sample, _, text = calls(1)[0]
    for depth in (1, 2, 3, 4):
        policy = Policy((FULL, depth, depth, depth), 0.0)
        with torch.no_grad(), applied(unet, DaToConfig(policy=policy)):
            outputs = [unet(sample, 500, text).sample for _ in range(4)]
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_perturbed_attention_leaves_its_blocks_unpruned_with_one_warning(pipeline, scheduler):
    from diffusers import StableDiffusionPAGPipeline

    plain, run = pipeline("StableDiffusion", scheduler)
    pipe = StableDiffusionPAGPipeline(**plain.components, requires_safety_checker=False, pag_applied_layers=["down"])
    pipe.set_progress_bar_config(disable=True)
    with applied(pipe, CONFIG) as handle:
        with pytest.warns(UserWarning, match="PAG.*unpruned") as warned:
            pipe(**run)
        pruned = handle.stats()["tokens_kept"]
    assert pruned
    assert all(name.startswith("up_blocks") for name in pruned)
    assert sum("unpruned" in str(warning.message) for warning in warned) == 1


def test_a_run_after_an_interrupted_one_starts_clean(pipeline):
    pipe, run = pipeline()
    expected = []
    with applied(pipe, CONFIG):
        run["generator"].manual_seed(2)
        expected = pipe(**run).images

    def stop(pipe, step, timestep, inputs):
        pipe._interrupt = step >= 2
        return inputs

    with applied(pipe, CONFIG) as handle:
        pipe(**run, callback_on_step_end=stop)
        handle.stats()
        run["generator"].manual_seed(2)
        assert torch.equal(pipe(**run).images, expected)
