"""HunyuanVideo 1 and 1.5: text last, padded and masked; single blocks project by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def finish(attention: Any, attended: Tensor, hidden_states: Tensor, text: Tensor | None) -> Any:
    """Return what `HunyuanVideoAttnProcessor2_0`, like that of 1.5, makes of its attention's output."""
    length = hidden_states.shape[1]
    vision, text = attended[:, :length], attended[:, length:]
    if getattr(attention, "to_out", None) is not None:
        vision = attention.to_out[1](attention.to_out[0](vision))
    if getattr(attention, "to_add_out", None) is not None:
        text = attention.to_add_out(text)
    return vision, text


def count_text(call: Mapping[str, Any]) -> Tensor:
    """Return how many tokens (B,) of a call of HunyuanVideo 1.5 are no padding: of two texts and of a first frame.

    The model puts them before the padding. The tokens of the frame count unless all are zero, which means no frame.
    """
    texts = [call[name].bool().sum(1) for name in ("encoder_attention_mask", "encoder_attention_mask_2")]
    image: Tensor = call["image_embeds"]
    return texts[0] + texts[1] + torch.any(image != 0) * image.shape[1]
