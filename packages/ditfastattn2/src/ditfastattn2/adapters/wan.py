"""Wan: the picture attends to itself, text enters by cross attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def finish(attention: Any, attended: Tensor, hidden_states: Tensor, text: Tensor | None) -> Any:
    """Return what `WanAttnProcessor` makes of its attention's output."""
    return attention.to_out[1](attention.to_out[0](attended))
