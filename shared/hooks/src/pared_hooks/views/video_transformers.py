"""Transformers that denoise video: Wan, HunyuanVideo 1 and 1.5, CogVideoX."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pared_hooks.views.denoiser import (
    AttentionSite,
    DenoiserBlock,
    DenoiserView,
    Grid,
    config_of,
    joint_blocks,
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
    parts = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
    return _hunyuan_video(model, "hunyuan-video", parts)


def build_hunyuan_video_15(model: nn.Module) -> DenoiserView:
    # The model sorts the tokens of both texts and of a first frame: those that are no padding come first.
    more_text = ("encoder_hidden_states_2", "image_embeds")
    return _hunyuan_video(model, "hunyuan-video-15", {"double": "transformer_blocks"}, more_text)


def _hunyuan_video(
    model: nn.Module, name: str, parts: Mapping[str, str], more_text: tuple[str, ...] = ()
) -> DenoiserView:
    config = config_of(model)
    patch = Grid(config.patch_size_t, config.patch_size, config.patch_size)
    blocks, attentions = joint_blocks(model, parts, ("vision", "text"), ("vision", "text"), "last")
    return DenoiserView(
        model=model,
        family="mmdit",
        architecture=name,
        blocks=blocks,
        attentions=attentions,
        sample_name="hidden_states",
        timestep_name="timestep",
        text_name="encoder_hidden_states",
        first=module_of(model, "x_embedder"),
        last=module_of(model, "proj_out"),
        rotary=module_of(model, "rope"),
        patch=patch,
        grid_of=patched_grid(patch),
        more_text=more_text,
    )


def build_cogvideox(model: nn.Module) -> DenoiserView:
    config = config_of(model)
    patch = Grid(config.patch_size_t or 1, config.patch_size, config.patch_size)
    streams, parts = ("vision", "text"), {"double": "transformer_blocks"}
    blocks, attentions = joint_blocks(model, parts, streams, streams, "first", attention="attn1")
    return DenoiserView(
        model=model,
        family="mmdit",
        architecture="cogvideox",
        blocks=blocks,
        attentions=attentions,
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
