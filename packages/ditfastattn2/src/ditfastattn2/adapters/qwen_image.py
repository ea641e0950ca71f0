"""Qwen-Image: text first, padded."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def finish(attention: Any, attended: Tensor, hidden_states: Tensor, text: Tensor | None) -> Any:
    """Return what `QwenDoubleStreamAttnProcessor2_0` makes of its attention's output."""
    length = attended.shape[1] - hidden_states.shape[1]
    vision = attended[:, length:].contiguous()
    for layer in attention.to_out:
        vision = layer(vision)
    return vision, attention.to_add_out(attended[:, :length].contiguous())
