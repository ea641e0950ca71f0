"""A UNet call of one depth as a pure function of tensors, unit by unit, out of the model's own modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pared_hooks import UnsupportedModelError
from pared_kernels import dato_norm_gather, dato_recover_add
from torch import Tensor

from dato.adapters.unet_units import Unit
from dato.functional import FULL, TokenPlan, prune_tokens
from dato.pruning import gather_mask

if TYPE_CHECKING:
    from dato.adapters.unet import UNetAdapter


@dataclass(frozen=True)
class Conditioning:
    """Everything a UNet call takes besides sample and timestep, as its forward names it."""

    encoder_hidden_states: Tensor | None
    class_labels: Tensor | None
    timestep_cond: Tensor | None
    attention_mask: Tensor | None
    encoder_attention_mask: Tensor | None
    added_cond_kwargs: dict[str, Any] | None
    cross_attention_kwargs: dict[str, Any] | None
    down_residuals: tuple[Tensor, ...] | None
    """Of a ControlNet, by unit."""
    mid_residual: Tensor | None
    adapter_features: tuple[Tensor, ...] | None
    """Of a T2I-Adapter, by down block."""

    @classmethod
    def of(cls, adapter: UNetAdapter, arguments: Mapping[str, Any]) -> Conditioning:
        """Sort the arguments of a call. Raises `UnsupportedModelError` for what only the hooks backend supports."""
        unet = adapter.denoiser
        kwargs = arguments.get("cross_attention_kwargs") or {}
        if "gligen" in kwargs or kwargs.get("scale", 1.0) != 1.0:
            raise UnsupportedModelError('GLIGEN and LoRA scales need DaToConfig(backend="hooks")')
        if any(getattr(block, "b1", None) for block in unet.up_blocks):
            raise UnsupportedModelError('FreeU needs DaToConfig(backend="hooks")')
        if unet.config.addition_embed_type == "image_hint":
            raise UnsupportedModelError('UNets with an image hint need DaToConfig(backend="hooks")')
        down = arguments.get("down_block_additional_residuals")
        mid = arguments.get("mid_block_additional_residual")
        inside = arguments.get("down_intrablock_additional_residuals")
        if inside is None and down is not None and mid is None:
            down, inside = None, down
        return cls(
            arguments.get("encoder_hidden_states"),
            arguments.get("class_labels"),
            arguments.get("timestep_cond"),
            arguments.get("attention_mask"),
            arguments.get("encoder_attention_mask"),
            arguments.get("added_cond_kwargs"),
            {key: value for key, value in kwargs.items() if key != "scale"} or None,
            tuple(down) if down is not None else None,
            mid,
            tuple(inside) if inside is not None else None,
        )


torch.utils._pytree.register_dataclass(Conditioning)


@dataclass(frozen=True)
class Pruned:
    """How one transformer block prunes: `plan(tokens)` of the block's input or, for "norm", of its normalised input."""

    plan: Callable[[Tensor], TokenPlan]
    metric: str


@dataclass(frozen=True)
class _Shared:
    """What all units of a call share."""

    temb: Tensor
    encoder_hidden_states: Tensor | None
    attention_mask: Tensor | None
    encoder_attention_mask: Tensor | None
    cross_attention_kwargs: dict[str, Any] | None
    pruned: Mapping[str, Pruned]


def unet_forward(
    adapter: UNetAdapter,
    sample: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    depth: int,
    deep: Tensor | None,
    wanted: frozenset[int],
    pruned: Mapping[str, Pruned],
) -> tuple[Tensor, dict[int, Tensor]]:
    """Prediction of a call of `depth` (section 3.1) and the features that depths `wanted` start from, where computed.

    `sample` is `(B, C, H, W)`, `deep` the stored output of up unit `depth` (of the mid block when `depth` is the
    number of units), None for FULL. `pruned` maps names of transformer blocks to how they prune.
    """
    unet, units = adapter.denoiser, adapter.units
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    shared = _shared(unet, sample, timestep, conditioning, pruned)
    count = units.num_units if depth == FULL else depth
    forwards_size = any(side % 2**unet.num_upsamplers for side in sample.shape[-2:])

    hidden = sample
    skips: list[Tensor] = []
    inside = conditioning.adapter_features or ()
    for unit in units.down[:count]:
        hidden = _unit(unit, hidden, shared)
        if unit.block is not None and unit.block < len(inside) and adapter.residual_units[unit.block] == unit.index:
            hidden = hidden + inside[unit.block]
        skips.append(hidden)
    if conditioning.down_residuals is not None:
        # A residual of a ControlNet is added to the skip connection alone.
        skips = [skip + residual for skip, residual in zip(skips, conditioning.down_residuals, strict=False)]

    features: dict[int, Tensor] = {}
    if depth == FULL:
        hidden = _mid(unet.mid_block, hidden, shared)
        if units.num_units in wanted:
            features[units.num_units] = hidden
    else:
        assert deep is not None
        hidden = deep
    if count == units.num_units:
        hidden = _add_to_mid(hidden, conditioning, len(unet.down_blocks))
    for unit in reversed(units.up[:count]):
        size = skips[unit.index - 1].shape[2:] if forwards_size and unit.sampler is not None else None
        hidden = _unit(unit, torch.cat([hidden, skips[unit.index]], dim=1), shared, size)
        if unit.index in wanted:
            features[unit.index] = hidden

    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    return unet.conv_out(hidden), features


def _shared(
    unet: Any, sample: Tensor, timestep: Tensor, conditioning: Conditioning, pruned: Mapping[str, Pruned]
) -> _Shared:
    added = conditioning.added_cond_kwargs
    emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), conditioning.timestep_cond)
    class_emb = unet.get_class_embed(sample=sample, class_labels=conditioning.class_labels)
    if class_emb is not None:
        emb = torch.cat([emb, class_emb], dim=-1) if unet.config.class_embeddings_concat else emb + class_emb
    text = conditioning.encoder_hidden_states
    aug_emb = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
    if aug_emb is not None:
        emb = emb + aug_emb
    if unet.time_embed_act is not None:
        emb = unet.time_embed_act(emb)
    text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
    return _Shared(
        emb,
        text,
        _bias(conditioning.attention_mask, sample),
        _bias(conditioning.encoder_attention_mask, sample),
        conditioning.cross_attention_kwargs,
        pruned,
    )


def _bias(mask: Tensor | None, sample: Tensor) -> Tensor | None:
    """A mask of ones and zeros as a bias with a dimension for the queries, as the UNet makes it."""
    return None if mask is None else ((1 - mask.to(sample.dtype)) * -10000.0).unsqueeze(1)


def _unit(unit: Unit, hidden: Tensor, shared: _Shared, upsample_size: Any = None) -> Tensor:
    if unit.resnet is not None:
        hidden = unit.resnet(hidden, shared.temb)
    if unit.attention is not None:
        hidden = _attention(unit.attention, unit.names[1], hidden, shared)
    if unit.sampler is not None:
        hidden = unit.sampler(hidden, upsample_size) if unit.direction == "up" else unit.sampler(hidden)
    return hidden


def _mid(mid: Any, hidden: Tensor, shared: _Shared) -> Tensor:
    if not getattr(mid, "has_cross_attention", False):
        return mid(hidden, shared.temb)
    if not any(name.startswith("mid_block.") for name in shared.pruned):
        return mid(
            hidden,
            shared.temb,
            encoder_hidden_states=shared.encoder_hidden_states,
            attention_mask=shared.attention_mask,
            cross_attention_kwargs=shared.cross_attention_kwargs,
            encoder_attention_mask=shared.encoder_attention_mask,
        )
    hidden = mid.resnets[0](hidden, shared.temb)
    for index, (attention, resnet) in enumerate(zip(mid.attentions, mid.resnets[1:], strict=True)):
        hidden = resnet(_attention(attention, f"mid_block.attentions.{index}", hidden, shared), shared.temb)
    return hidden


def _add_to_mid(hidden: Tensor, conditioning: Conditioning, num_down_blocks: int) -> Tensor:
    inside = conditioning.adapter_features or ()
    if len(inside) > num_down_blocks and inside[num_down_blocks].shape == hidden.shape:
        hidden = hidden + inside[num_down_blocks]
    if conditioning.mid_residual is not None and conditioning.down_residuals is not None:
        hidden = hidden + conditioning.mid_residual
    return hidden


def _attention(transformer: Any, name: str, hidden: Tensor, shared: _Shared) -> Tensor:
    """A `Transformer2DModel`; block by block when one of them prunes."""
    names = [f"{name}.transformer_blocks.{index}" for index in range(len(transformer.transformer_blocks))]
    options = {
        "attention_mask": shared.attention_mask,
        "encoder_hidden_states": shared.encoder_hidden_states,
        "encoder_attention_mask": shared.encoder_attention_mask,
        "cross_attention_kwargs": shared.cross_attention_kwargs,
    }
    if not any(block_name in shared.pruned for block_name in names):
        return transformer(hidden, **options, return_dict=False)[0]
    batch, _, height, width = hidden.shape
    residual = hidden
    hidden, inner_dim = transformer._operate_on_continuous_inputs(hidden)
    for block_name, block in zip(names, transformer.transformer_blocks, strict=True):
        pruned = shared.pruned.get(block_name)
        hidden = block(hidden, **options) if pruned is None else _pruned_block(block, hidden, pruned, shared)
    return transformer._get_output_for_continuous_inputs(
        hidden_states=hidden, residual=residual, batch_size=batch, height=height, width=width, inner_dim=inner_dim
    )


def _pruned_block(block: Any, hidden: Tensor, pruned: Pruned, shared: _Shared) -> Tensor:
    """A `BasicTransformerBlock` whose self-attention runs on the kept tokens (section 3.5)."""
    kwargs = shared.cross_attention_kwargs or {}
    if pruned.metric == "norm":
        normalised = block.norm1(hidden)
        plan = pruned.plan(normalised)
        kept = prune_tokens(normalised, plan)
    else:
        plan = pruned.plan(hidden)
        kept = dato_norm_gather(hidden, plan.keep_idx, block.norm1.weight, block.norm1.bias, block.norm1.eps)
    mask = shared.attention_mask
    if mask is not None:
        mask = gather_mask(mask, plan, block.attn1.heads)
    attended = block.attn1(kept, attention_mask=mask, **kwargs)
    hidden = dato_recover_add(hidden, attended, plan.gather_map)
    if block.attn2 is not None:
        hidden = hidden + block.attn2(
            block.norm2(hidden),
            encoder_hidden_states=shared.encoder_hidden_states,
            attention_mask=shared.encoder_attention_mask,
            **kwargs,
        )
    return hidden + block.ff(block.norm3(hidden))
