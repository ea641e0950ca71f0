"""Flux 1 and 2: text first; in single blocks the sequence comes joined and is projected by the block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ditfastattn2.adapters.base import Finish


def finish(attention: Any, attended: Tensor, hidden_states: Tensor, text: Tensor | None) -> Any:
    """Return what `FluxAttnProcessor` and `Flux2AttnProcessor` make of their attention's output."""
    if text is None:
        return attended
    length = text.shape[1]
    text, vision = attended[:, :length].contiguous(), attended[:, length:].contiguous()
    return attention.to_out[1](attention.to_out[0](vision)), attention.to_add_out(text)


def finish_of_flux2(attention: Any) -> Finish | None:
    """Single blocks of Flux 2 project queries, keys, values and the MLP in one product: nothing can be left out."""
    return None if hasattr(attention, "to_qkv_mlp_proj") else finish
