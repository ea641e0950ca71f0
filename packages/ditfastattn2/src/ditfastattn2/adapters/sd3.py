"""Stable Diffusion 3: picture and text in one sequence, text last; the second attention of 3.5 has no text."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def finish(attention: Any, attended: Tensor, hidden_states: Tensor, text: Tensor | None) -> Any:
    """Return what `JointAttnProcessor2_0` makes of its attention's output."""
    out, dropout = attention.to_out[0], attention.to_out[1]
    if text is None:
        return dropout(out(attended))
    vision, text = attended[:, : hidden_states.shape[1]], attended[:, hidden_states.shape[1] :]
    if not attention.context_pre_only:
        text = attention.to_add_out(text)
    return dropout(out(vision)), text
