"""Families whose frames are runs of a video token with text between them: MiniCPM-V 4.6 and 4.7, Gemma 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from framefusion.adapters.base import append, frames_from_runs, placeholders, resolver
from framefusion.config import FrameFusionConfig
from framefusion.layout import TokenLayout


@resolver("MiniCPMV4_6Model", "MiniCPMV4_7Model", "Gemma4Model")
def video_token_runs(model: nn.Module, config: FrameFusionConfig, inputs: Mapping[str, Any]) -> TokenLayout | None:
    """Consecutive runs of the video token of equal length are the frames of one video; images only with "always"."""
    settings: Any = model.config
    ids = inputs["input_ids"]
    layout = frames_from_runs(placeholders(ids, settings.video_token_id))
    if config.image_streams == "always":
        layout = append(layout, frames_from_runs(placeholders(ids, settings.image_token_id)))
    return layout
