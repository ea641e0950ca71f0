"""Configurations of the published UNets, for cost tables and for full-size speed runs with random weights."""

from __future__ import annotations

from typing import Any

_SD15 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}

KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": _SD15,
    "sd21": {
        **_SD15,
        "sample_size": 96,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Keyword arguments of `UNet2DConditionModel` for SD 1.5, SD 2.1 (768 px), SDXL; `sample_size` is the latent side."""
