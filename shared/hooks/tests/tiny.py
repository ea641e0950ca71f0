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


def stable_diffusion_3(scheduler):
    from diffusers import StableDiffusion3Pipeline

    model, _ = sd3()
    absent = dict.fromkeys([f"{part}{suffix}" for part in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3")])
    pipeline = StableDiffusion3Pipeline(transformer=model, scheduler=scheduler, vae=None, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_stable_diffusion_3(pipeline, steps: int = 4, **options):
    return pipeline(
        prompt_embeds=torch.randn(1, 4, 8),
        negative_prompt_embeds=torch.zeros(1, 4, 8),
        pooled_prompt_embeds=torch.randn(1, 8),
        negative_pooled_prompt_embeds=torch.zeros(1, 8),
        num_inference_steps=steps,
        height=64,
        width=64,
        output_type="latent",
        **options,
    ).images


def stable_diffusion_xl(scheduler):
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=sdxl()[0],
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_stable_diffusion_xl(pipeline, steps: int = 4, **options):
    return pipeline(
        prompt_embeds=torch.randn(1, 5, 8),
        negative_prompt_embeds=torch.zeros(1, 5, 8),
        pooled_prompt_embeds=torch.randn(1, 8),
        negative_pooled_prompt_embeds=torch.zeros(1, 8),
        num_inference_steps=steps,
        height=16,
        width=16,
        output_type="latent",
        **options,
    ).images


# Denoisers, each with the keyword arguments of one call


def _generator():
    return torch.Generator().manual_seed(1)


def randn(*shape):
    return torch.randn(*shape, generator=_generator())


def denoisers():
    """Family name -> function that builds (model, call arguments)."""
    return {
        "sd15": sd15,
        "sdxl": sdxl,
        "dit": dit,
        "pixart": pixart,
        "sd3": sd3,
        "flux": flux_transformer,
        "flux2": flux2_transformer,
        "qwen-image": qwen_image,
        "wan": wan_call,
        "hunyuan-video": hunyuan_video,
        "hunyuan-video-15": hunyuan_video_15,
        "cogvideox": cogvideox,
    }


def sd15():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 8, 16, 16),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return model.eval(), {
        "sample": randn(2, 4, 16, 12),
        "timestep": 500,
        "encoder_hidden_states": randn(2, 5, 8),
    }


def sdxl():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 3],
        use_linear_projection=True,
        attention_head_dim=[2, 4, 4],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    return model.eval(), {
        "sample": randn(1, 4, 16, 16),
        "timestep": 500,
        "encoder_hidden_states": randn(1, 5, 8),
        "added_cond_kwargs": {"text_embeds": randn(1, 8), "time_ids": torch.zeros(1, 6)},
    }


def dit():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
    )
    return model.eval(), {
        "hidden_states": randn(1, 4, 16, 16),
        "timestep": torch.tensor([5]),
        "class_labels": torch.tensor([1]),
    }


def pixart():
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=8,
        use_additional_conditions=False,
    )
    return model.eval(), {
        "hidden_states": randn(1, 4, 16, 16),
        "encoder_hidden_states": randn(1, 5, 8),
        "timestep": torch.tensor([5]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model.eval(), {
        "hidden_states": randn(1, 4, 12, 16),
        "encoder_hidden_states": randn(1, 5, 8),
        "pooled_projections": randn(1, 8),
        "timestep": torch.tensor([5.0]),
    }


def flux_transformer():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    model = flux(FlowMatchEulerDiscreteScheduler()).transformer
    return model, {
        "hidden_states": randn(1, 24, 16),
        "encoder_hidden_states": randn(1, 5, 8),
        "pooled_projections": randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, 4, 6, torch.device("cpu"), torch.float32),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.tensor([3.0]),
    }


def flux2_transformer():
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    row, column = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    zero = torch.zeros(24, dtype=torch.long)
    ids = torch.stack([zero, row.flatten(), column.flatten(), zero], dim=1)
    return model.eval(), {
        "hidden_states": randn(1, 24, 16),
        "encoder_hidden_states": randn(1, 5, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids[None],
        "txt_ids": torch.zeros(1, 5, 4),
        "guidance": torch.tensor([3.0]),
    }


def qwen_image():
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(8, 4, 4),
    )
    return model.eval(), {
        "hidden_states": randn(1, 24, 16),
        "encoder_hidden_states": randn(1, 5, 8),
        "encoder_hidden_states_mask": torch.ones(1, 5, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 6)]],
    }


def wan_call():
    return wan_transformer(), {
        "hidden_states": randn(1, 4, 2, 8, 12),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": randn(1, 5, 8),
    }


def hunyuan_video():
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return model.eval(), {
        "hidden_states": randn(1, 4, 2, 8, 12),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": randn(1, 5, 8),
        "encoder_attention_mask": torch.ones(1, 5),
        "pooled_projections": randn(1, 8),
        "guidance": torch.tensor([3.0]),
    }


def hunyuan_video_15():
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return model.eval(), {
        "hidden_states": randn(1, 4, 2, 4, 6),
        "timestep": torch.tensor([5.0]),
        "encoder_hidden_states": randn(1, 5, 8),
        "encoder_attention_mask": torch.ones(1, 5),
        "encoder_hidden_states_2": randn(1, 3, 8),
        "encoder_attention_mask_2": torch.ones(1, 3),
        "image_embeds": randn(1, 2, 8),
    }


def cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
    )
    return model.eval(), {
        "hidden_states": randn(1, 2, 4, 8, 12),
        "encoder_hidden_states": randn(1, 5, 8),
        "timestep": torch.tensor([5]),
    }


# Language models


def decoders():
    """Family name -> function that builds the model."""
    return {
        "llama": lambda: _language_model("Llama"),
        "qwen2": lambda: _language_model("Qwen2"),
        "qwen3": lambda: _language_model("Qwen3", head_dim=16),
        "mistral": lambda: _language_model("Mistral", sliding_window=4),
        "gemma3": gemma3,
        "llava-onevision": llava_onevision,
        "qwen2_5_vl": qwen2_5_vl,
        "qwen3_vl": qwen3_vl,
        "internvl": internvl,
    }


def more_decoders():
    """Name of further models -> function that builds the model, family that reads it."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
    return {
        "qwen3_moe": (lambda: _language_model("Qwen3Moe", head_dim=16, **experts), "qwen3"),
        "ministral3": (lambda: _language_model("Ministral3", head_dim=16), "mistral"),
        "gemma2": (lambda: _language_model("Gemma2", head_dim=16), "gemma2"),
        "smollm3": (lambda: _language_model("SmolLM3"), "smollm3"),
        "granite": (lambda: _language_model("Granite"), "granite"),
        "gpt_oss": (lambda: _language_model("GptOss", head_dim=16, num_local_experts=4), "gpt_oss"),
        "olmo2": (lambda: _language_model("Olmo2"), "olmo"),
        "olmo3": (lambda: _language_model("Olmo3"), "olmo"),
        "phi3": (lambda: _language_model("Phi3"), "phi3"),
        "gemma3-vl": (gemma3_vl, "gemma3"),
        "smolvlm": (smolvlm, "llama"),
        "llava-next-video": (llava_next_video, "llama"),
        "video-llama3": (video_llama3, "qwen2"),
        "qwen2_vl": (qwen2_vl, "qwen2_vl"),
        "qwen3_vl_moe": (qwen3_vl_moe, "qwen3_vl"),
        "qwen3_5": (qwen3_5, "qwen3_5"),
        "gemma4": (gemma4, "gemma4"),
    }


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def _language_model(name: str, **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**TEXT, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    return Gemma3ForCausalLM(Gemma3TextConfig(**TEXT, head_dim=16, query_pre_attn_scalar=16, **layers)).eval()


def llava_onevision():
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=60,
        video_token_index=61,
    )
    return LlavaOnevisionForConditionalGeneration(config).eval()


def llava_next_video():
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=60,
        video_token_index=61,
    )
    return LlavaNextVideoForConditionalGeneration(config).eval()


def gemma3_vl():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(text_config={**TEXT, "head_dim": 16}, vision_config=VISION, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config).eval()


def smolvlm():
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    text = {"model_type": "llama", **TEXT}
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(text_config=text, vision_config=VISION, scale_factor=2, image_token_id=60)
    ).eval()


def video_llama3():
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    vision = {key: value for key, value in VISION.items() if key != "image_size"}
    config = VideoLlama3Config(text_config={"model_type": "qwen2", **TEXT}, vision_config=vision)
    return VideoLlama3ForConditionalGeneration(config).eval()


def qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
    )
    return Qwen2VLForConditionalGeneration(config).eval()


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "fullatt_block_indexes": [1],
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3_vl():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    )
    return Qwen3VLForConditionalGeneration(config).eval()


def qwen3_vl_moe():
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3VLMoeConfig(**qwen3_vl().config.to_dict())
    text = config.text_config.to_dict() | experts | {"model_type": "qwen3_vl_moe_text"}
    vision = config.vision_config.to_dict()
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision)).eval()


def qwen3_5():
    """A text model whose first layer is one of linear attention."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    layers = {"layer_types": ["linear_attention", "full_attention"]}
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TEXT, head_dim=16, **linear, **layers)).eval()


def gemma4():
    """A text model whose last two layers take keys and values from the ones before."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
    heads = {"head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
    shared = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 64, "num_hidden_layers": 4}
    return Gemma4ForCausalLM(Gemma4TextConfig(**{**TEXT, **shared}, **heads, **layers)).eval()


def internvl():
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [4, 4],
        },
        image_seq_length=16,
        image_token_id=60,
    )
    return InternVLForConditionalGeneration(config).eval()
