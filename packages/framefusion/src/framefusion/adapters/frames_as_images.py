"""Families that show a video as images with text between them: InternVL, SmolVLM, Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from framefusion.adapters.base import frames_from_runs, placeholders, resolver
from framefusion.config import FrameFusionConfig
from framefusion.layout import TokenLayout


@resolver("InternVLModel", "SmolVLMModel", "Gemma3Model")
def frames_as_images(model: nn.Module, config: FrameFusionConfig, inputs: Mapping[str, Any]) -> TokenLayout | None:
    """Consecutive images of equally many tokens are the frames of one video, unless `image_streams` is "never"."""
    if config.image_streams == "never":
        return None
    token = model.config.image_token_id  # type: ignore[union-attr]
    return frames_from_runs(placeholders(inputs["input_ids"], token))  # type: ignore[arg-type]
