"""Whole pipelines of the real classes with random weights: batched guidance, separate guidance, two denoisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dfa_models import flux, sd3, wan
from torch import Tensor


def wan_pipeline(*, two: bool = False) -> tuple[Any, Callable[[int], Tensor]]:
    """A WanPipeline, with two denoisers or one, and a function that runs it for some steps with guidance."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    first, second = wan(), wan()
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.mul_(0.9)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True],
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=first.model,
        transformer_2=second.model if two else None,
        boundary_ratio=0.5 if two else None,
    )
    pipe.set_progress_bar_config(disable=True)

    def run(steps: int) -> Tensor:
        return pipe(
            prompt_embeds=first.text,
            negative_prompt_embeds=-first.text,
            latents=first.sample.clone(),
            num_inference_steps=steps,
            height=64,
            width=64,
            num_frames=9,
            output_type="latent",
        ).frames

    return pipe, run


def flux_pipeline() -> tuple[Any, Callable[[int], Tensor]]:
    """A FluxPipeline, and a function that runs it for some steps with a negative prompt."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    tiny = flux()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=tiny.model,
    )
    pipe.set_progress_bar_config(disable=True)

    def run(steps: int) -> Tensor:
        return pipe(
            prompt_embeds=tiny.text,
            pooled_prompt_embeds=tiny.text.mean(1),
            negative_prompt_embeds=-tiny.text,
            negative_pooled_prompt_embeds=-tiny.text.mean(1),
            true_cfg_scale=2.0,
            latents=tiny.sample.clone(),
            num_inference_steps=steps,
            height=128,
            width=128,
            output_type="latent",
        ).images

    return pipe, run


def pipeline(size: int = 64) -> Any:
    """A StableDiffusion3Pipeline with random weights, two text encoders, and pictures of `size` pixels."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from pared_zoo.recipes.tokenizer import world_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    tokenizer = world_tokenizer(8)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        shift_factor=0.0,
    )
    blank_tokenizer = T5Tokenizer(extra_ids=0)
    blank = T5EncoderModel(
        T5Config(vocab_size=len(blank_tokenizer), d_model=32, num_layers=0, num_heads=1, d_kv=1, d_ff=1)
    ).eval()
    pipe = StableDiffusion3Pipeline(
        transformer=sd3(dual=True).model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=CLIPTextModelWithProjection(text_config).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=blank,
        tokenizer_3=blank_tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
