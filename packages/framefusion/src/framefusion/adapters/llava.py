"""LLaVA-OneVision and LLaVA-NeXT-Video: every video of a prompt has the frames of `pixel_values_videos`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from framefusion.adapters.base import append, frames_from_runs, placeholders, require_sizes, resolver, split_rows
from framefusion.config import FrameFusionConfig
from framefusion.layout import TokenLayout


@resolver("LlavaOnevisionModel")
def llava_onevision(model: nn.Module, config: FrameFusionConfig, inputs: Mapping[str, Any]) -> TokenLayout | None:
    """ceil(side / 2)^2 tokens a frame after pooling, and one newline behind the last, which is no vision token."""
    settings: Any = model.config
    side = settings.vision_config.image_size // settings.vision_config.patch_size
    return _videos(model, config, inputs, math.ceil(side / 2) ** 2, trailing=1)


@resolver("LlavaNextVideoModel")
def llava_next_video(model: nn.Module, config: FrameFusionConfig, inputs: Mapping[str, Any]) -> TokenLayout | None:
    """(side / stride)^2 tokens a frame after pooling."""
    settings: Any = model.config
    side = settings.vision_config.image_size // settings.vision_config.patch_size
    return _videos(model, config, inputs, (side // settings.spatial_pool_stride) ** 2, trailing=0)


def _videos(
    model: nn.Module, config: FrameFusionConfig, inputs: Mapping[str, Any], patches: int, trailing: int
) -> TokenLayout | None:
    settings: Any = model.config
    ids, layout = inputs["input_ids"], None
    videos = placeholders(ids, settings.video_token_id)
    if videos.any():
        (pixels,) = require_sizes(inputs, "pixel_values_videos")
        layout = TokenLayout.empty(*ids.shape)
        count, frames = pixels.shape[:2]
        numbers: dict[int, int] = {}
        for row, places in split_rows(videos, [frames * patches + trailing] * count):
            layout.place(row, places[: frames * patches], patches, numbers.setdefault(row, 0))
            numbers[row] += 1
    if config.image_streams == "always":
        layout = append(layout, frames_from_runs(placeholders(ids, settings.image_token_id)))
    return layout
