"""The attention implementation under FrameFusion: the one before, and at some stages the importance of the keys."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from pared_hooks import UnsupportedModelError
from torch import Tensor

from framefusion.functional.pruning import importance_in_model_dtype, last_query_importance
from framefusion.masks import EAGER, is_flash

if TYPE_CHECKING:
    from framefusion.request import Request

KEY = "framefusion_request"
"""Keyword under which a request travels from the decoder through its layers to their attention."""


def interface_of(base: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Attention that also notes the importance for a request that asks, and the mask function of `base`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    if base not in masks or (base != EAGER and base not in functions):
        raise UnsupportedModelError(
            f"attn_implementation = {base!r} is not known to transformers' AttentionInterface with a mask function; "
            "use 'sdpa', 'eager', 'flash_attention_2' or 'flash_attention_3'"
        )

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        request: Request | None = kwargs.pop(KEY, None)
        if request is not None and request.wanting:
            request.importance = importance(request, query, key, attention_mask, kwargs.get("scaling"))
        plain = functions[base] if base != EAGER else _eager(module)
        if is_flash(base):
            # transformers chooses the flash functions by the name in the module's config.
            module = _Seen(module, config=_Seen(module.config, _attn_implementation=base))
        return plain(module, query, key, value, attention_mask, **kwargs)

    return attention, masks[base]


class _Seen:
    """An object as it is, but for these attributes."""

    def __init__(self, target: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def _eager(module: Any) -> Callable[..., Any]:
    # Each family has its own, in the module of the attention's class.
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return function


@torch.no_grad()
def importance(request: Request, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Importance (batch, n) float32 of the request's n tokens, with keys of the past sharing the softmax."""
    config = request.engine.config
    queries = min(config.importance_queries, query.shape[2])
    held = request.keys_held(key.shape[2], query.shape[2])
    visible = _visible(mask, key.shape[0], key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    score = last_query_importance if config.importance_dtype == "float32" else importance_in_model_dtype
    scores = score(
        query[:, :, -queries:], key[:, :, :held], scale, None if visible is None else visible[:, :held].contiguous()
    )
    return scores[:, held - query.shape[2] :].float()


def _visible(mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """Keys that the last query sees, (batch, keys) bool; None: all."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, :keys].bool()
    last = mask[:, 0, -1, :keys].expand(batch, -1)
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
