"""VideoLLaMA3: its processor has dropped some tokens already, and says which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from framefusion.adapters.base import append, image_frames, placeholders, require_sizes, resolver, split_rows
from framefusion.config import FrameFusionConfig
from framefusion.layout import TokenLayout


@resolver("VideoLlama3Model")
def video_llama3(model: nn.Module, config: FrameFusionConfig, inputs: Mapping[str, Any]) -> TokenLayout | None:
    """Token j before `video_compression_mask` is patch j mod P of frame j div P; only those it keeps are there."""
    settings: Any = model.config
    ids, layout = inputs["input_ids"], None
    videos = placeholders(ids, settings.video_token_id)
    if videos.any():
        grid, merges = require_sizes(inputs, "video_grid_thw", "video_merge_sizes")
        areas = [size**2 for size in merges.tolist()]
        counts = [t * h * w // area for (t, h, w), area in zip(grid.tolist(), areas, strict=True)]
        patches = [h * w // area for (_, h, w), area in zip(grid.tolist(), areas, strict=True)]
        mask = inputs.get("video_compression_mask")
        kept = mask.cpu() if isinstance(mask, Tensor) else torch.ones(sum(counts), dtype=torch.bool)
        # For beams `generate` repeats each entry of the mask, as it does with rows of a batch.
        kept = kept[:: max(1, len(kept) // sum(counts))]
        present = [one.nonzero().flatten() for one in kept.split(counts)]
        layout = TokenLayout.empty(*ids.shape)
        numbers: dict[int, int] = {}
        places_by_video = split_rows(videos, [len(one) for one in present])
        for (row, places), index, size in zip(places_by_video, present, patches, strict=True):
            layout.patch[row, places] = index % size
            layout.frame[row, places] = index // size
            layout.stream[row, places] = numbers.setdefault(row, 0)
            numbers[row] += 1
    images = placeholders(ids, settings.image_token_id)
    if config.image_streams == "always" and images.any():
        grid, merges = require_sizes(inputs, "image_grid_thw", "image_merge_sizes")
        sizes = [(*size, merge) for size, merge in zip(grid.tolist(), merges.tolist(), strict=True)]
        lengths = [t * h * w // merge**2 for t, h, w, merge in sizes]
        layout = append(layout, image_frames(images, sizes, lengths))
    return layout
