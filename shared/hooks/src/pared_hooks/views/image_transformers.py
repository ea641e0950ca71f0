"""Transformers that denoise pictures: DiT, PixArt, Stable Diffusion 3, Flux 1 and 2, Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pared_hooks.errors import ConfigError
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
    token_positions,
)

_ONE = Grid(1, 1, 1)


def build_dit(model: nn.Module) -> DenoiserView:
    return _plain_transformer(model, "dit", None, "proj_out_2")


def build_pixart(model: nn.Module) -> DenoiserView:
    return _plain_transformer(model, "pixart", "encoder_hidden_states", "proj_out")


def _plain_transformer(model: nn.Module, name: str, text: str | None, last: str) -> DenoiserView:
    patch = Grid(1, config_of(model).patch_size, config_of(model).patch_size)
    blocks: list[DenoiserBlock] = []
    attentions: list[AttentionSite] = []
    for index, block in enumerate(module_of(model, "transformer_blocks").children()):
        path = f"transformer_blocks.{index}"
        blocks.append(DenoiserBlock(index, path, block, "block"))
        attentions.append(AttentionSite(f"{path}.attn1", module_of(block, "attn1"), "self", index))
        if block.attn2 is not None:
            attentions.append(AttentionSite(f"{path}.attn2", module_of(block, "attn2"), "cross", index))
    return DenoiserView(
        model=model,
        family="dit",
        architecture=name,
        blocks=tuple(blocks),
        attentions=tuple(attentions),
        sample_name="hidden_states",
        timestep_name="timestep",
        text_name=text,
        first=module_of(model, "pos_embed"),
        last=module_of(model, last),
        rotary=None,
        patch=patch,
        grid_of=patched_grid(patch),
    )


def build_sd3(model: nn.Module) -> DenoiserView:
    patch = Grid(1, config_of(model).patch_size, config_of(model).patch_size)
    blocks: list[DenoiserBlock] = []
    attentions: list[AttentionSite] = []
    for index, block in enumerate(module_of(model, "transformer_blocks").children()):
        path = f"transformer_blocks.{index}"
        blocks.append(DenoiserBlock(index, path, block, "double", 0, ("vision", "text"), ("text", "vision")))
        attentions.append(AttentionSite(f"{path}.attn", module_of(block, "attn"), "joint", index, "last"))
        if getattr(block, "attn2", None) is not None:
            attentions.append(AttentionSite(f"{path}.attn2", module_of(block, "attn2"), "self", index))
    return DenoiserView(
        model=model,
        family="mmdit",
        architecture="sd3",
        blocks=tuple(blocks),
        attentions=tuple(attentions),
        sample_name="hidden_states",
        timestep_name="timestep",
        text_name="encoder_hidden_states",
        first=module_of(model, "pos_embed"),
        last=module_of(model, "proj_out"),
        rotary=None,
        patch=patch,
        grid_of=patched_grid(patch),
    )


def build_flux(model: nn.Module) -> DenoiserView:
    return _double_and_single(model, "flux", ("vision", "text"), ("text", "vision"))


def build_flux2(model: nn.Module) -> DenoiserView:
    # Single blocks take and return both streams as one sequence.
    return _double_and_single(model, "flux2", ("joint",), ("joint",))


def _double_and_single(model: nn.Module, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> DenoiserView:
    """View of a model with two kinds of blocks, text first; `inputs` and `outputs` are those of the single ones."""
    blocks: list[DenoiserBlock] = []
    attentions: list[AttentionSite] = []
    streams = {"double": (("vision", "text"), ("text", "vision")), "single": (inputs, outputs)}
    for part, holder in (("double", "transformer_blocks"), ("single", "single_transformer_blocks")):
        for index, block in enumerate(module_of(model, holder).children()):
            path = f"{holder}.{index}"
            number = len(blocks)
            blocks.append(DenoiserBlock(number, path, block, part, 0, *streams[part]))
            attentions.append(AttentionSite(f"{path}.attn", module_of(block, "attn"), "joint", number, "first"))
    return DenoiserView(
        model=model,
        family="mmdit",
        architecture=name,
        blocks=tuple(blocks),
        attentions=tuple(attentions),
        sample_name="hidden_states",
        timestep_name="timestep",
        text_name="encoder_hidden_states",
        first=module_of(model, "x_embedder"),
        last=module_of(model, "proj_out"),
        rotary=module_of(model, "pos_embed"),
        patch=_ONE,
        grid_of=_grid_of_ids,
    )


def build_qwen_image(model: nn.Module) -> DenoiserView:
    parts = {"double": "transformer_blocks"}
    blocks, attentions = joint_blocks(model, parts, ("vision", "text"), ("text", "vision"), "first")
    return DenoiserView(
        model=model,
        family="mmdit",
        architecture="qwen-image",
        blocks=blocks,
        attentions=attentions,
        sample_name="hidden_states",
        timestep_name="timestep",
        text_name="encoder_hidden_states",
        first=module_of(model, "img_in"),
        last=module_of(model, "proj_out"),
        rotary=module_of(model, "pos_embed"),
        patch=_ONE,
        grid_of=_grid_of_shapes,
    )


def _grid_of_ids(sample_shape: Sequence[int], call: Mapping[str, Any]) -> Grid:
    ids = call.get("img_ids")
    if ids is None:
        raise ConfigError(
            "the tokens of Flux are packed: pass img_ids of the denoiser call to know their grid", "img_ids"
        )
    # Flux 2 passes ids of every sample, all alike.
    ids = ids[0] if ids.dim() == 3 else ids
    # Kontext and Flux 2 append reference pictures, which differ from the generated one in the first id.
    return _checked(token_positions(ids[ids[:, 0] == ids[0, 0]]), sample_shape, "img_ids")


def _grid_of_shapes(sample_shape: Sequence[int], call: Mapping[str, Any]) -> Grid:
    shapes = call.get("img_shapes")
    if shapes is None:
        raise ConfigError(
            "the tokens of Qwen-Image are packed: pass img_shapes of the denoiser call to know their grid", "img_shapes"
        )
    first = shapes[0]
    first = first[0] if isinstance(first, list) else first
    return _checked(Grid(*first), sample_shape, "img_shapes")


def _checked(grid: Grid, sample_shape: Sequence[int], field: str) -> Grid:
    # Editing pipelines append the tokens of reference pictures, so there may be more than the grid holds.
    if len(sample_shape) != 3 or sample_shape[1] < grid.num_tokens:
        raise ConfigError(
            f"sample_shape = {tuple(sample_shape)} is not valid: (batch, tokens, channels) with at least "
            f"{grid.num_tokens} tokens, as {field} says",
            "sample_shape",
        )
    return grid


register_denoiser_family("dit", ("DiTTransformer2DModel",), build_dit)
register_denoiser_family("pixart", ("PixArtTransformer2DModel",), build_pixart)
register_denoiser_family("sd3", ("SD3Transformer2DModel",), build_sd3)
register_denoiser_family("flux", ("FluxTransformer2DModel",), build_flux)
register_denoiser_family("flux2", ("Flux2Transformer2DModel",), build_flux2)
register_denoiser_family("qwen-image", ("QwenImageTransformer2DModel",), build_qwen_image)
