"""The two measurements that run a pipeline: fidelity of a policy, and the dynamics profile."""

from __future__ import annotations

import pytest
import torch
from dato import FULL, DaToConfig, FidelityEvaluator, Policy, dynamics_profile

PROMPTS = ["a cat", "a tree by the sea", "x"]
STEPS = 6


@pytest.fixture
def pipe(sd_unet):
    """A tiny text-to-image pipeline of the real classes: DDIM, 16 x 16 latents, images of 32 x 32."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokens),
            max_position_embeddings=16, projection_dim=32, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
            pad_token_id=len(tokens) - 1,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=32,
        )  # fmt: skip
        pipe = StableDiffusionPipeline(
            vae=vae, text_encoder=CLIPTextModel(text), unet=sd_unet, scheduler=DDIMScheduler(),
            tokenizer=CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def evaluate(pipe):
    return FidelityEvaluator(pipe, PROMPTS, batch_size=2, num_inference_steps=STEPS, guidance_scale=3.0)


def test_a_policy_that_changes_nothing_has_perfect_fidelity(evaluate):
    assert evaluate(Policy([FULL] * STEPS, 0.0)) == pytest.approx(100)


def test_reusing_features_lowers_fidelity_and_leaves_the_pipeline_as_it_was(evaluate):
    before = evaluate.images()
    assert evaluate(Policy([FULL, 1, 1, 1, 1, 1], 0.0)) < 99
    assert torch.equal(evaluate.images(), before)


def test_a_policy_is_judged_on_the_same_latents_every_time(evaluate):
    policy = Policy([FULL, 1, 0, 1, FULL, 1], 0.3)
    assert evaluate(policy) == evaluate(policy)


def test_images_do_not_depend_on_the_batch_size(pipe, evaluate):
    single = FidelityEvaluator(pipe, PROMPTS, batch_size=1, num_inference_steps=STEPS, guidance_scale=3.0)
    torch.testing.assert_close(single.images(), evaluate.images(), rtol=1e-4, atol=1e-4)


def test_the_profile_has_one_entry_per_call_and_none_before_the_first(pipe):
    profile = dynamics_profile(pipe, PROMPTS, num_inference_steps=STEPS)
    assert profile.shape == (STEPS,)
    assert profile[0] == 0
    assert (profile[1:] > 0).all()


def test_skipped_calls_have_no_dynamics(pipe):
    config = DaToConfig(policy=Policy([FULL, 0, 1, 0, FULL, 1], 0.0))
    profile = dynamics_profile(pipe, PROMPTS, config, num_inference_steps=STEPS)
    assert (profile > 0).tolist() == [False, False, True, False, True, True]


def test_profiling_leaves_no_hook_behind(pipe):
    dynamics_profile(pipe, PROMPTS, DaToConfig(policy="uniform-2"), num_inference_steps=STEPS)
    assert not any(module._forward_hooks for module in pipe.unet.modules())
