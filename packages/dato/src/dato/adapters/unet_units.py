"""The units of a `UNet2DConditionModel`: which modules make skip connection u, and which consume it (section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pared_hooks import UnsupportedModelError
from torch import nn

_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
_MID_BLOCKS = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
_REMEDY = "Write an adapter beside dato.adapters.unet, or apply dato to the denoiser it contains."


@dataclass(frozen=True)
class SelfAttentionBlock:
    """A transformer block with self-attention: `module.attn1` over the tokens of resolution `level`."""

    name: str
    """Path of `module` in the model."""
    module: nn.Module
    direction: Literal["down", "mid", "up"]
    unit: int
    """Unit it belongs to; `num_units` for the mid block, which is deeper than every unit."""
    level: int
    """The token grid is the latent grid divided by `2 ** level`."""

    @property
    def downsample(self) -> int:
        """Side of the latent divided by the side of the token grid."""
        return 2**self.level


@dataclass(frozen=True)
class Unit:
    """One unit. Down unit u produces skip u, up unit u consumes it."""

    index: int
    direction: Literal["down", "up"]
    resnet: nn.Module | None
    """None for `conv_in` and for a downsampler, which are units of their own."""
    attention: nn.Module | None
    """The transformer that follows the resnet, if any."""
    sampler: nn.Module | None
    """Down: `conv_in` or the downsampler that is the whole unit. Up: the upsampler that follows, if any."""
    block: int | None
    """Index in `down_blocks` or `up_blocks`; None for `conv_in`."""
    level: int
    """Resnet and attention work on the latent grid divided by `2 ** level`; so does the input of `sampler`."""
    names: tuple[str, ...]
    """Paths of `modules` in the model."""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules of the unit, in the order they run."""
        return tuple(module for module in (self.resnet, self.attention, self.sampler) if module is not None)


@dataclass(frozen=True)
class UnetUnits:
    """All units of a UNet: `down[u]` and `up[u]` share skip u; a call of depth k computes those with index below k."""

    down: tuple[Unit, ...]
    up: tuple[Unit, ...]
    mid: nn.Module
    blocks: tuple[SelfAttentionBlock, ...]
    """Self-attention blocks in the order they run."""

    @property
    def num_units(self) -> int:
        """Number L of skip connections: 12 for SD1.5 and SD2.1, 9 for SDXL."""
        return len(self.down)

    @property
    def num_levels(self) -> int:
        """Number of resolutions."""
        return self.down[-1].level + 1

    def modules(self) -> Iterator[tuple[nn.Module, int]]:
        """Every unit module with its index in the order of a forward pass; the mid block has index `num_units`."""
        for unit in self.down:
            yield from ((module, unit.index) for module in unit.modules)
        yield self.mid, self.num_units
        for unit in reversed(self.up):
            yield from ((module, unit.index) for module in unit.modules)


def enumerate_units(unet: Any) -> UnetUnits:
    """Number the units of `unet` as section 3.1 does.

    Raises `UnsupportedModelError` for anything but a `UNet2DConditionModel` of plain and cross-attention blocks.
    """
    _refuse_unsupported(unet)
    down = tuple(_down_units(unet))
    up = tuple(_up_units(unet, len(down)))
    if [unit.index for unit in up] != list(range(len(down)))[::-1]:
        raise UnsupportedModelError(
            f"{type(unet).__name__} has {len(down)} skip connections but {len(up)} up units that could consume them"
        )
    blocks = [found for unit in down for found in _self_attention(unit.attention, unit.names, "down", unit)]
    bottom = down[-1]
    for index, attention in enumerate(getattr(unet.mid_block, "attentions", ())):
        blocks += [
            SelfAttentionBlock(f"mid_block.attentions.{index}.{name}", module, "mid", len(down), bottom.level)
            for name, module in _transformer_blocks(attention)
        ]
    blocks += [found for unit in up for found in _self_attention(unit.attention, unit.names, "up", unit)]
    return UnetUnits(down, up[::-1], unet.mid_block, tuple(blocks))


def _refuse_unsupported(model: object) -> None:
    from diffusers import UNet2DConditionModel

    if not isinstance(model, UNet2DConditionModel):
        raise UnsupportedModelError.unknown(model, ["UNet2DConditionModel"], _REMEDY)
    unet: Any = model
    for block in (*unet.down_blocks, *unet.up_blocks):
        if type(block).__name__ not in _BLOCKS:
            raise UnsupportedModelError.unknown(block, _BLOCKS, _REMEDY)
    if type(unet.mid_block).__name__ not in _MID_BLOCKS:
        raise UnsupportedModelError.unknown(unet.mid_block, _MID_BLOCKS, _REMEDY)


def _down_units(unet: Any) -> Iterator[Unit]:
    yield Unit(0, "down", None, None, unet.conv_in, None, 0, ("conv_in",))
    index, level = 1, 0
    for position, block in enumerate(unet.down_blocks):
        path = f"down_blocks.{position}"
        for resnet, attention, names in _layers(block, path):
            yield Unit(index, "down", resnet, attention, None, position, level, names)
            index += 1
        if block.downsamplers is not None:
            yield Unit(index, "down", None, None, block.downsamplers[0], position, level, (f"{path}.downsamplers.0",))
            index += 1
            level += 1


def _up_units(unet: Any, num_units: int) -> Iterator[Unit]:
    index = num_units - 1
    level = sum(block.downsamplers is not None for block in unet.down_blocks)
    for position, block in enumerate(unet.up_blocks):
        path = f"up_blocks.{position}"
        layers = list(_layers(block, path))
        for resnet, attention, names in layers[:-1]:
            yield Unit(index, "up", resnet, attention, None, position, level, names)
            index -= 1
        resnet, attention, names = layers[-1]
        if block.upsamplers is None:
            yield Unit(index, "up", resnet, attention, None, position, level, names)
        else:
            names = (*names, f"{path}.upsamplers.0")
            yield Unit(index, "up", resnet, attention, block.upsamplers[0], position, level, names)
            level -= 1
        index -= 1


def _layers(block: Any, path: str) -> Iterator[tuple[nn.Module, nn.Module | None, tuple[str, ...]]]:
    attentions = getattr(block, "attentions", None)
    for index, resnet in enumerate(block.resnets):
        if attentions is None:
            yield resnet, None, (f"{path}.resnets.{index}",)
        else:
            yield resnet, attentions[index], (f"{path}.resnets.{index}", f"{path}.attentions.{index}")


def _self_attention(
    attention: nn.Module | None, names: tuple[str, ...], direction: Literal["down", "up"], unit: Unit
) -> list[SelfAttentionBlock]:
    if attention is None:
        return []
    return [
        SelfAttentionBlock(f"{names[1]}.{name}", module, direction, unit.index, unit.level)
        for name, module in _transformer_blocks(attention)
    ]


def _transformer_blocks(attention: Any) -> Iterator[tuple[str, nn.Module]]:
    """Transformer blocks whose `attn1` is self-attention: with `only_cross_attention` it reads the text instead."""
    for index, module in enumerate(getattr(attention, "transformer_blocks", ())):
        if not module.only_cross_attention:
            yield f"transformer_blocks.{index}", module
