"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: sizes of the videos come as (T, H, W) grids of patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from framefusion.adapters.base import append, image_frames, placeholders, require_sizes, resolver, split_rows
from framefusion.config import FrameFusionConfig
from framefusion.layout import TokenLayout


@resolver("Qwen2VLModel", "Qwen2_5_VLModel", "Qwen3VLModel", "Qwen3VLMoeModel")
def qwen_vl(model: nn.Module, config: FrameFusionConfig, inputs: Mapping[str, Any]) -> TokenLayout | None:
    """Frames are the T temporal patches (two frames each in Qwen2-VL), whether or not timestamps come between."""
    settings: Any = model.config
    area = settings.vision_config.spatial_merge_size**2
    ids = inputs["input_ids"]
    videos = placeholders(ids, settings.video_token_id)
    layout = None
    if videos.any():
        (grid,) = require_sizes(inputs, "video_grid_thw")
        layout = TokenLayout.empty(*ids.shape)
        sizes = grid.tolist()
        numbers: dict[int, int] = {}
        for (row, places), (_, height, width) in zip(
            split_rows(videos, [t * h * w // area for t, h, w in sizes]), sizes, strict=True
        ):
            layout.place(row, places, height * width // area, numbers.setdefault(row, 0))
            numbers[row] += 1
    images = placeholders(ids, settings.image_token_id)
    if config.image_streams == "always" and images.any():
        (grid,) = require_sizes(inputs, "image_grid_thw")
        sizes = [tuple(size) for size in grid.tolist()]
        layout = append(layout, image_frames(images, sizes, [t * h * w // area for t, h, w in sizes]))
    return layout
