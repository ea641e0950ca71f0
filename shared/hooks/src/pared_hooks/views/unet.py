"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pared_hooks.errors import UnsupportedModelError
from pared_hooks.views.denoiser import (
    AttentionSite,
    DenoiserBlock,
    DenoiserView,
    Grid,
    module_of,
    patched_grid,
    register_denoiser_family,
)


def build(model: nn.Module) -> DenoiserView:
    blocks: list[DenoiserBlock] = []
    attentions: list[AttentionSite] = []
    for name, module, part, level in _parts(model):
        block = DenoiserBlock(len(blocks), name, module, part, level, ("vision",), ("vision",))
        blocks.append(block)
        attentions.extend(_attentions(block))
    return DenoiserView(
        model=model,
        family="unet",
        architecture="unet2d-condition",
        blocks=tuple(blocks),
        attentions=tuple(attentions),
        sample_name="sample",
        timestep_name="timestep",
        text_name="encoder_hidden_states",
        first=module_of(model, "conv_in"),
        last=module_of(model, "conv_out"),
        rotary=None,
        patch=Grid(1, 1, 1),
        grid_of=patched_grid(Grid(1, 1, 1)),
    )


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, int]]:
    level = 0
    for index, block in enumerate(module_of(model, "down_blocks").children()):
        yield f"down_blocks.{index}", block, "down", level
        level += getattr(block, "downsamplers", None) is not None
    if model.mid_block is not None:
        yield "mid_block", module_of(model, "mid_block"), "mid", level
    for index, block in enumerate(module_of(model, "up_blocks").children()):
        yield f"up_blocks.{index}", block, "up", level
        level -= getattr(block, "upsamplers", None) is not None


def _attentions(block: DenoiserBlock) -> Iterator[AttentionSite]:
    for index, transformer in enumerate(getattr(block.module, "attentions", None) or ()):
        inner = getattr(transformer, "transformer_blocks", None)
        if inner is None:
            raise UnsupportedModelError(
                f"{block.name}.attentions.{index} is a {type(transformer).__name__}; only UNets whose attention sits "
                "in Transformer2DModel are supported"
            )
        for depth, layer in enumerate(inner):
            name = f"{block.name}.attentions.{index}.transformer_blocks.{depth}"
            crosses = layer.only_cross_attention
            yield AttentionSite(
                f"{name}.attn1", layer.attn1, "cross" if crosses else "self", block.index, None, block.level
            )
            if layer.attn2 is not None:
                kind = "cross" if layer.attn2.is_cross_attention else "self"
                yield AttentionSite(f"{name}.attn2", layer.attn2, kind, block.index, None, block.level)  # type: ignore[arg-type]


register_denoiser_family("unet2d-condition", ("UNet2DConditionModel",), build)
