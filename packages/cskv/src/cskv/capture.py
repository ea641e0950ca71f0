"""Reading what every attention layer receives, while the model runs unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pared_hooks import ConfigError, DecoderView, Patch
from torch import Tensor

from cskv.adapters import AttentionAdapter

Reader = Callable[[AttentionAdapter, Tensor, Tensor, Tensor], None]
Batch = Tensor | Mapping[str, Tensor]


@contextmanager
def reading(adapters: Iterable[AttentionAdapter], read: Reader) -> Iterator[None]:
    """Call `read(adapter, hidden_states, cos, sin)` before each of these attentions runs."""
    patch = Patch("cskv.capture")
    try:
        with patch:
            for adapter in adapters:
                patch.add_hook(adapter.module, "forward_pre", _hook(adapter, read), with_kwargs=True)
        yield
    finally:
        patch.remove()


def _hook(adapter: AttentionAdapter, read: Reader) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = adapter.arguments(args, kwargs)
        cos, sin = arguments["position_embeddings"]
        read(adapter, arguments["hidden_states"], cos, sin)

    return hook


def run_batch(view: DecoderView, batch: Batch) -> Tensor | None:
    """Run the decoder on token ids (B, T), or the whole model on a mapping of its inputs, without a cache.

    Returns the attention mask (B, T) of the batch, or None when all its tokens count. Raises ConfigError for a batch
    without `input_ids` or of another shape.
    """
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        found = type(ids).__name__ if not isinstance(ids, Tensor) else f"{tuple(ids.shape)} of {ids.dtype}"
        raise ConfigError(f"batches: input_ids is {found}; whole token numbers (batch, tokens) are needed", "batches")
    device = next(view.embed.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    only_text = set(inputs) <= {"input_ids", "attention_mask", "position_ids"}
    with torch.no_grad():
        (view.model if only_text else view.root)(**inputs, use_cache=False)
    return inputs.get("attention_mask")
