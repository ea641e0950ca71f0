"""Text features in the places of the transformer's prefix."""

from __future__ import annotations

from typing import Any

import torch


def caption_features(
    text_encoder: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the last ``length`` tokens of each caption, padded on the left.

    Args:
        text_encoder: a ``CLIPTextModel``.
        input_ids: int64 (captions, tokens), padded on the right.
        attention_mask: (captions, tokens), 1 at tokens and 0 at padding.
        length: places.

    Returns:
        Features (captions, length, width), zeros at padding, and bool (captions, length), True at features.
    """
    features = text_encoder(input_ids).last_hidden_state
    counts = attention_mask.sum(dim=1, keepdim=True)
    places = counts - length + torch.arange(length, device=input_ids.device)
    mask = places >= 0
    index = places.clamp(min=0)[..., None].expand(-1, -1, features.shape[-1])
    return features.gather(1, index) * mask[..., None], mask
