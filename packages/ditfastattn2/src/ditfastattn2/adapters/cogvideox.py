"""CogVideoX: text first, one projection for both."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def finish(attention: Any, attended: Tensor, hidden_states: Tensor, text: Tensor | None) -> Any:
    """Return what `CogVideoXAttnProcessor2_0` makes of its attention's output."""
    length = attended.shape[1] - hidden_states.shape[1]
    text, vision = attention.to_out[1](attention.to_out[0](attended)).split([length, hidden_states.shape[1]], dim=1)
    return vision, text
