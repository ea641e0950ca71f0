"""Transformers that denoise video: Wan, HunyuanVideo 1 and 1.5, CogVideoX."""

from __future__ import annotations

from torch import nn

from pared_hooks.views.denoiser import (
    AttentionSite,
    DenoiserBlock,
    DenoiserView,
    Grid,
    config_of,
    module_of,
    patched_grid,
    register_denoiser_family,
)


def build_wan(model: nn.Module) -> DenoiserView:
    patch = Grid(*config_of(model).patch_size)
    blocks: list[DenoiserBlock] = []
    attentions: list[AttentionSite] = []
    for index, block in enumerate(module_of(model, "blocks").children()):
        path = f"blocks.{index}"
        blocks.append(DenoiserBlock(index, path, block, "block", 0, ("vision", "text"), ("vision",)))
        attentions.append(AttentionSite(f"{path}.attn1", module_of(block, "attn1"), "self", index))
        attentions.append(AttentionSite(f"{path}.attn2", module_of(block, "attn2"), "cross", index))
    return DenoiserView(
        model=model,
        family="dit",
        architecture="wan",
        blocks=tuple(blocks),
        attentions=tuple(attentions),
        sample_name="hidden_states",
        timestep_name="timestep",
        text_name="encoder_hidden_states",
        first=module_of(model, "patch_embedding"),
        last=module_of(model, "proj_out"),
        rotary=module_of(model, "rope"),
        patch=patch,
        grid_of=patched_grid(patch),
    )


def build_hunyuan_video(model: nn.Module) -> DenoiserView:
    config = config_of(model)
    patch = Grid(config.patch_size_t, config.patch_size, config.patch_size)
    blocks: list[DenoiserBlock] = []
    attentions: list[AttentionSite] = []
    for part, holder in (("double", "transformer_blocks"), ("single", "single_transformer_blocks")):
        for index, block in enumerate(module_of(model, holder).children()):
            path, number = f"{holder}.{index}", len(blocks)
            blocks.append(DenoiserBlock(number, path, block, part, 0, ("vision", "text"), ("vision", "text")))
            attentions.append(AttentionSite(f"{path}.attn", module_of(block, "attn"), "joint", number, "last"))
    return DenoiserView(
        model=model,
        family="mmdit",
        architecture="hunyuan-video",
        blocks=tuple(blocks),
        attentions=tuple(attentions),
        sample_name="hidden_states",
        timestep_name="timestep",
        text_name="encoder_hidden_states",
        first=module_of(model, "x_embedder"),
        last=module_of(model, "proj_out"),
        rotary=module_of(model, "rope"),
        patch=patch,
        grid_of=patched_grid(patch),
    )


def build_hunyuan_video_15(model: nn.Module) -> DenoiserView:
    config = config_of(model)
    patch = Grid(config.patch_size_t, config.patch_size, config.patch_size)
    blocks: list[DenoiserBlock] = []
    attentions: list[AttentionSite] = []
    for index, block in enumerate(module_of(model, "transformer_blocks").children()):
        path = f"transformer_blocks.{index}"
        blocks.append(DenoiserBlock(index, path, block, "double", 0, ("vision", "text"), ("vision", "text")))
        attentions.append(AttentionSite(f"{path}.attn", module_of(block, "attn"), "joint", index, "last"))
    return DenoiserView(
        model=model,
        family="mmdit",
        architecture="hunyuan-video-15",
        blocks=tuple(blocks),
        attentions=tuple(attentions),
        sample_name="hidden_states",
        timestep_name="timestep",
        text_name="encoder_hidden_states",
        first=module_of(model, "x_embedder"),
        last=module_of(model, "proj_out"),
        rotary=module_of(model, "rope"),
        patch=patch,
        grid_of=patched_grid(patch),
        # The model sorts the tokens of both texts and of a first frame: those that are no padding come first.
        more_text=("encoder_hidden_states_2", "image_embeds"),
    )


def build_cogvideox(model: nn.Module) -> DenoiserView:
    config = config_of(model)
    patch = Grid(config.patch_size_t or 1, config.patch_size, config.patch_size)
    blocks: list[DenoiserBlock] = []
    attentions: list[AttentionSite] = []
    for index, block in enumerate(module_of(model, "transformer_blocks").children()):
        path = f"transformer_blocks.{index}"
        blocks.append(DenoiserBlock(index, path, block, "double", 0, ("vision", "text"), ("vision", "text")))
        attentions.append(AttentionSite(f"{path}.attn1", module_of(block, "attn1"), "joint", index, "first"))
    return DenoiserView(
        model=model,
        family="mmdit",
        architecture="cogvideox",
        blocks=tuple(blocks),
        attentions=tuple(attentions),
        sample_name="hidden_states",
        timestep_name="timestep",
        text_name="encoder_hidden_states",
        first=module_of(model, "patch_embed"),
        last=module_of(model, "proj_out"),
        # The pipeline computes the rotary table and passes it as `image_rotary_emb`.
        rotary=None,
        patch=patch,
        grid_of=patched_grid(patch, frames_first=True),
    )


register_denoiser_family("wan", ("WanTransformer3DModel",), build_wan)
register_denoiser_family("hunyuan-video", ("HunyuanVideoTransformer3DModel",), build_hunyuan_video)
register_denoiser_family("hunyuan-video-15", ("HunyuanVideo15Transformer3DModel",), build_hunyuan_video_15)
register_denoiser_family("cogvideox", ("CogVideoXTransformer3DModel",), build_cogvideox)
