"""Tiny pipelines of the real diffusers classes, with random weights and no text encoder."""

from __future__ import annotations

import torch


def unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()


def stable_diffusion(scheduler, image_to_image: bool = False):
    from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8)
    pipeline_class = StableDiffusionImg2ImgPipeline if image_to_image else StableDiffusionPipeline
    pipeline = pipeline_class(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_stable_diffusion(pipeline, steps: int = 4, guidance_scale: float = 5.0, **options):
    if hasattr(pipeline, "get_timesteps"):
        options = {"image": torch.randn(1, 4, 8, 8), **options}
    else:
        options = {"height": 8, "width": 8, **options}
    embeds = torch.randn(1, 3, 8)
    return pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="latent",
        **options,
    ).images


def wan_transformer():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()


def wan(scheduler):
    from diffusers import AutoencoderKLWan, WanPipeline

    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=wan_transformer(), scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_wan(pipeline, steps: int = 3, guidance_scale: float = 5.0):
    embeds = torch.randn(1, 4, 8)
    return pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=32,
        width=32,
        num_frames=5,
        output_type="latent",
    ).frames


def flux(scheduler):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_flux(pipeline, steps: int = 3, true_cfg_scale: float = 1.0):
    return pipeline(
        prompt_embeds=torch.randn(1, 4, 8),
        pooled_prompt_embeds=torch.randn(1, 8),
        negative_prompt_embeds=torch.zeros(1, 4, 8),
        negative_pooled_prompt_embeds=torch.zeros(1, 8),
        true_cfg_scale=true_cfg_scale,
        num_inference_steps=steps,
        height=32,
        width=32,
        output_type="latent",
    ).images
