"""Decoding through pared_kernels: a token is stored by one operator, and one attends to latents and exact tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pared_kernels import cskv_append, cskv_decode
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from cskv.adapters import attention_function

if TYPE_CHECKING:
    from cskv.cache import Applied, CSKVLayer, Handed

EXTRAS = ("softcap", "s_aux", "position_bias", "sliding_window")
"""Arguments of an attention function that change its result in ways the operator does not know."""

Rotary = tuple[Tensor, Tensor, Tensor, Tensor]


def append(layer: CSKVLayer, hidden_states: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None) -> None:
    """Store one token in place: `hidden_states` (B, 1, d), `key`, `value` (B, H_kv, 1, D), `rotary` of `reserve`."""
    keys, values = layer.sides
    ranks = layer.spec.plan.k_rank, layer.spec.plan.v_rank
    latents = [
        side.store.reserve(1, hidden_states.new_empty(hidden_states.shape[0], 0, rank or 0))
        for side, rank in zip((keys, values), ranks, strict=True)
    ]
    exact = [side.tail.reserve(1, one.transpose(1, 2)) for side, one in ((keys, key), (values, value))]
    down = layer.spec.buffers.down
    assert down is not None
    cskv_append(
        hidden_states[:, 0],
        down,
        key[:, :, 0],
        value[:, :, 0],
        *(rows[:, 0] for rows in (*latents, *exact)),
        rotary=None if rotary is None else (rotary[0][:, 0], rotary[1][:, 0], rotary[2][:, 0], rotary[3][:, 0]),
    )


def attend(handed: Handed, query: Tensor, scale: float, start: Tensor | None) -> Tensor:
    """Attention (B, H_q, 1, D) of the rotated query (B, H_q, 1, D) over the tokens of a layer (sections 3.4, 3.6).

    `start`: (B,) int64, first token of each row that counts, or None.
    """
    layer, rebuilt = handed.layer, handed.rebuilt
    spec, (keys, values) = layer.spec, layer.sides
    (c_k, k_quantized), (c_v, v_quantized) = keys.store.parts(rebuilt), values.store.parts(rebuilt)
    turns = spec.plan.adapter.uses_rope
    cos, sin = layer.rotary.kept(layer.device, rebuilt) if turns else (None, None)
    buffers = spec.buffers
    assert buffers.up_k is not None
    assert buffers.up_v is not None
    return cskv_decode(
        query,
        c_k,
        c_v,
        buffers.up_k,
        buffers.up_v,
        keys.exact(rebuilt),
        values.exact(rebuilt),
        cos,
        sin,
        scale=scale,
        start=start,
        bias_k=buffers.bias_k,
        bias_v=buffers.bias_v,
        k_quantized=k_quantized,
        v_quantized=v_quantized,
        clamped=spec.config.zero_point == "clamped",
    )


class FusedAttention:
    """An attention implementation of transformers: one new token reads its cache layer, the rest goes on as before.

    `previous` is the implementation it stands in for, `name` the one it is registered under.
    """

    def __init__(self, previous: str, applied: Applied) -> None:
        self.previous = str(previous)
        self.name = ""
        self._applied = applied
        self._mask: Any = None
        self._start: Tensor | None = None

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        """The mask that the previous implementation takes."""
        return ALL_MASK_ATTENTION_FUNCTIONS[self.previous](*args, **kwargs)

    @torch.compiler.disable
    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        handed = self._applied.handed.pop(id(module), None)
        if handed is not None:
            known, start = self._starts(attention_mask, query)
            extras = dropout or kwargs.get("output_attentions") or any(kwargs.get(one) is not None for one in EXTRAS)
            graph = torch.is_grad_enabled() and query.requires_grad
            if known and not extras and not graph and query.dtype == key.dtype:
                scale = query.shape[-1] ** -0.5 if scaling is None else scaling
                return attend(handed, query, scale, start).transpose(1, 2), None
            key, value = handed.layer.columns(handed.rebuilt, handed.rebuilt)
        function = attention_function(self.previous, module)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    def _starts(self, mask: Any, query: Tensor) -> tuple[bool, Tensor | None]:
        """Whether the mask of one query is that of rows padded on the left at most, and the first token of each."""
        if mask is None:
            return True, None
        if mask is not self._mask:
            # All layers of a step get the same mask: looked at once, it costs the host one wait a step.
            self._mask, self._start = mask, None
            if isinstance(mask, Tensor) and (mask.ndim == 2 or mask.shape[1:3] == (1, 1)):
                # Flash attention takes a mask of tokens, the others one of pairs, bool or additive.
                allowed = mask.bool() if mask.ndim == 2 else (mask if mask.dtype == torch.bool else mask == 0)[:, 0, 0]
                start = allowed.int().argmax(-1)
                if bool((allowed.sum(-1) == allowed.shape[1] - start).all()):
                    self._start = start.expand(query.shape[0]).contiguous()
        return self._start is not None, self._start
