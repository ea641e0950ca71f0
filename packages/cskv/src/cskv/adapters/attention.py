"""`AttentionAdapter`: keys, values, norm and rotation of one layer's attention, whatever its family calls them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pared_hooks import DecoderView, UnsupportedModelError
from torch import Tensor, nn

from cskv.adapters.projections import linear_map
from cskv.errors import UnsupportedAttentionError
from cskv.functional import rotate, split_heads

ARGUMENTS = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
"""Arguments of an attention's forward that CSKV reads; all but the third must exist."""


@dataclass(frozen=True, eq=False)
class AttentionAdapter:
    """One attention module, seen by CSKV. `layer_type` is that of the cache: "full_attention" can be compressed."""

    index: int
    name: str
    module: nn.Module
    layer_type: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: torch.dtype
    projections: dict[str, nn.Module]
    key_norm: nn.Module | None
    rope: Callable[..., tuple[Tensor, Tensor]]
    uses_rope: bool
    has_sinks: bool
    caps_scores: bool

    @property
    def width(self) -> int:
        """d_kv: channels of all key heads together."""
        return self.num_kv_heads * self.head_dim

    def maps(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """(weight (d_kv, d), bias (d_kv,) or None) of the key and of the value projection."""
        if "qkv" not in self.projections:
            key, value = (self._map(role) for role in ("key", "value"))
            return key, value
        weight, bias = self._map("qkv")
        begin = self.num_heads * self.head_dim
        rows = slice(begin, begin + self.width), slice(begin + self.width, begin + 2 * self.width)
        key, value = ((weight[part], None if bias is None else bias[part]) for part in rows)
        return key, value

    def _map(self, role: str) -> tuple[Tensor, Tensor | None]:
        return linear_map(self.projections[role], self.hidden_size, self.dtype)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of one call of the module by name."""
        return {**dict(zip(_parameters(type(self.module)), args, strict=False)), **kwargs}

    def norm_keys(self, keys: Tensor) -> Tensor:
        """Apply the family's norm of keys, per head or over all of them; (B, T, d_kv) both ways."""
        norm: Any = self.key_norm
        if norm is None:
            return keys
        if norm.weight.numel() == self.width:
            return norm(keys)
        return norm(keys.view(*keys.shape[:2], self.num_kv_heads, self.head_dim)).reshape(keys.shape)

    def rotate_keys(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate (B, H_kv, T, D) with the model file's own function; `cos`, `sin` (B or 1, T, D_rot)."""
        # The function rotates queries and keys together: give it queries of no heads.
        return self.rope(keys[:, :0], keys, cos, sin)[1].to(keys.dtype)

    def rotates_halves(self) -> bool:
        """Whether the model file pairs channel i with i + D_rot / 2, as `functional.rotate` does; asked by trying."""
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(1, self.num_kv_heads, 2, self.head_dim, generator=generator)
        angles = torch.rand(1, 2, self.head_dim // 2, generator=generator).repeat(1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        return torch.allclose(self.rotate_keys(keys, cos, sin), rotate(keys, cos, sin), atol=1e-5)

    def finish_keys(self, keys: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Projected keys (B, T, d_kv), bias included, to what attention uses: normalised, in heads, rotated."""
        heads = split_heads(self.norm_keys(keys), self.num_kv_heads)
        if not self.uses_rope:
            return heads
        assert cos is not None
        assert sin is not None
        return self.rotate_keys(heads, cos, sin)


def adapters_of(model: nn.Module) -> tuple[DecoderView, list[AttentionAdapter]]:
    """The decoder of `model` and an adapter for each of its layers.

    Raises `UnsupportedAttentionError` (an `UnsupportedModelError` and a `NotImplementedError`) naming the class for an
    architecture, or a kind of attention, that is not known.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    try:
        view = DecoderView.of(model)
    except UnsupportedModelError as error:
        raise UnsupportedAttentionError(str(error)) from None
    types, _ = get_layer_types_and_kwargs(view.config.get_text_config(decoder=True))
    adapters = []
    for layer, layer_type in zip(view.layers, types, strict=True):
        module: Any = layer.attention
        name = type(module).__name__
        if "qkv" not in layer.projections and not {"key", "value"} <= set(layer.projections):
            raise UnsupportedAttentionError(f"{name} has neither key and value projections nor a fused one")
        if missing := [argument for argument in ARGUMENTS if argument not in _parameters(type(module))]:
            raise UnsupportedAttentionError(f"{name}.forward does not take {missing[0]!r}, which CSKV has to read")
        adapters.append(
            AttentionAdapter(
                index=layer.index,
                name=f"{layer.name}: {name}",
                module=module,
                layer_type=layer_type,
                num_heads=view.num_heads,
                num_kv_heads=view.num_key_value_heads,
                head_dim=view.head_dim,
                hidden_size=view.hidden_size,
                dtype=next(view.embed.parameters()).dtype,
                projections=dict(layer.projections),
                key_norm=layer.norms.get("key"),
                rope=_rope_of(module),
                # SmolLM3 says it per layer, as 0 or 1.
                uses_rope=bool(getattr(module, "use_rope", True)),
                has_sinks=getattr(module, "sinks", None) is not None,
                caps_scores=getattr(view.config, "attn_logit_softcapping", None) is not None,
            )
        )
    return view, adapters


def _parameters(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]


def _rope_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function with which the file of the module's class rotates queries and keys."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "apply_rotary_pos_emb", None)
        if found is not None:
            return found
    raise UnsupportedAttentionError(
        f"{type(module).__name__}: its model file has no apply_rotary_pos_emb; CSKV needs rotary positions"
    )


def attention_function(implementation: str, module: nn.Module) -> Callable[..., Any]:
    """The function that `module` attends with under this implementation's name; "eager" is that of its model file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = sys.modules[type(module).__module__]
    return ALL_ATTENTION_FUNCTIONS.get(implementation) or eager.eager_attention_forward
