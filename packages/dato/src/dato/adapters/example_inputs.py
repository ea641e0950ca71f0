"""Arguments of one denoiser call on the meta device, for counting FLOPs without weights or data."""

from __future__ import annotations

from typing import Any

import torch
from pared_hooks import UnsupportedModelError
from torch import Tensor


def example_inputs(model: Any, sample_shape: tuple[int, ...], text_tokens: int) -> dict[str, Any]:
    """Keyword arguments of `model.forward` as meta tensors: sample of `sample_shape`, `text_tokens` text tokens.

    Raises `UnsupportedModelError` for a model or a kind of conditioning that it cannot make up.
    """
    builders = {
        "UNet2DConditionModel": _unet,
        "DiTTransformer2DModel": _dit,
        "PixArtTransformer2DModel": _pixart,
        "SD3Transformer2DModel": _sd3,
    }
    name = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in builders), None)
    if name is None:
        raise UnsupportedModelError.unknown(model, builders, "Add its arguments to dato.adapters.example_inputs.")
    return builders[name](model.config, sample_shape, text_tokens)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _unet(config: Any, sample_shape: tuple[int, ...], text_tokens: int) -> dict[str, Any]:
    batch = sample_shape[0]
    width = config.cross_attention_dim
    if config.encoder_hid_dim is not None:
        width = config.encoder_hid_dim
    elif not isinstance(width, int):
        width = width[0]
    inputs: dict[str, Any] = {
        "sample": _empty(*sample_shape),
        "timestep": _empty(batch),
        "encoder_hidden_states": _empty(batch, text_tokens, width),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": _empty(batch, pooled), "time_ids": _empty(batch, 6)}
    elif config.addition_embed_type is not None or config.class_embed_type is not None:
        raise UnsupportedModelError(
            f"cannot make up inputs for addition_embed_type={config.addition_embed_type!r}, "
            f"class_embed_type={config.class_embed_type!r}; known: 'text_time' or none, none"
        )
    return inputs


def _dit(config: Any, sample_shape: tuple[int, ...], text_tokens: int) -> dict[str, Any]:
    labels = _empty(sample_shape[0], dtype=torch.long)
    return {"hidden_states": _empty(*sample_shape), "timestep": labels, "class_labels": labels}


def _pixart(config: Any, sample_shape: tuple[int, ...], text_tokens: int) -> dict[str, Any]:
    batch = sample_shape[0]
    return {
        "hidden_states": _empty(*sample_shape),
        "timestep": _empty(batch),
        "encoder_hidden_states": _empty(batch, text_tokens, config.caption_channels or config.cross_attention_dim),
        "added_cond_kwargs": {"resolution": _empty(batch, 2), "aspect_ratio": _empty(batch, 1)},
    }


def _sd3(config: Any, sample_shape: tuple[int, ...], text_tokens: int) -> dict[str, Any]:
    batch = sample_shape[0]
    return {
        "hidden_states": _empty(*sample_shape),
        "timestep": _empty(batch),
        "encoder_hidden_states": _empty(batch, text_tokens, config.joint_attention_dim),
        "pooled_projections": _empty(batch, config.pooled_projection_dim),
    }
