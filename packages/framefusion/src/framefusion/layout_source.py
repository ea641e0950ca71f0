"""Where the layout of a prompt comes from: it was given, or is read from what the model is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from framefusion.adapters.base import Resolver
from framefusion.config import FrameFusionConfig
from framefusion.decoder_layer import parameters
from framefusion.layout import TokenLayout

SIZES, REPEATS = "framefusion_sizes", "framefusion_repeats"
"""Attributes of encoded features."""
Notes = tuple[dict[str, Any], int]
"""What encoded features were made of, by argument of the model, and how often each is repeated for beams."""


class LayoutSource:
    """The layouts of one model's prompts. `inner` joins vision tower and decoder; `layout` is that of every prompt."""

    def __init__(
        self, inner: nn.Module, config: FrameFusionConfig, resolver: Resolver | None, layout: TokenLayout | None
    ) -> None:
        self.layout = layout
        self.disabled = False
        self._inner, self._config, self._resolver = inner, config, resolver
        self._names = parameters(inner)
        self._next: ContextVar[TokenLayout | None] = ContextVar("framefusion.next", default=None)
        self._read: ContextVar[TokenLayout | None] = ContextVar("framefusion.read", default=None)
        self._chunked: ContextVar[tuple[TokenLayout | None, int] | None] = ContextVar(
            "framefusion.chunked", default=None
        )
        self._noted: ContextVar[Notes | None] = ContextVar("framefusion.noted", default=None)

    def announce(self, layout: TokenLayout) -> None:
        """Use `layout` for the next prompt of this context."""
        self._next.set(layout)

    def layout_of(self, batch: int, tokens: int, cache: Any) -> TokenLayout | None:
        """The layout of a forward of (batch, tokens) behind what is cached. Raises `LayoutError` for one of another."""
        if self.disabled:
            return None
        if not torch.compiler.is_compiling() and (chunked := self._chunked.get()) is not None:
            whole, start = chunked
            return None if whole is None else whole.columns(_length(cache) - start, tokens).fit(batch, tokens)
        chosen = self._take()
        return None if chosen is None else chosen.fit(batch, tokens)

    def _take(self) -> TokenLayout | None:
        chosen = self._next.get()
        if chosen is not None and not torch.compiler.is_compiling():
            self._next.set(None)
        chosen = chosen if chosen is not None else self._read.get()
        return self.layout if chosen is None else chosen

    def _resolve(self, given: dict[str, Any], ids: Tensor) -> TokenLayout | None:
        """What the resolver reads from these arguments, unless a layout was given."""
        if self._resolver is None or self.layout is not None or self._next.get() is not None:
            return None
        sizes, repeats = self._noted.get() or _notes(given)
        missing = {name: value for name, value in sizes.items() if given.get(name) is None}
        # `generate` repeats every row for its beams; one of each tells where the videos are.
        return self._resolver(self._inner, self._config, {**given, **missing, "input_ids": ids[::repeats]})

    def run_inner(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Read the layout of the prompt from the arguments of the inner model."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        if self.disabled or torch.compiler.is_compiling() or not isinstance(ids, Tensor) or ids.shape[1] == 1:
            return original(*args, **kwargs)
        if self._chunked.get() is not None:
            return original(*args, **kwargs)
        with _set(self._read, self._resolve(given, ids)):
            return original(*args, **kwargs)

    def run_prefill(
        self,
        original: Callable[..., Any],
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
        **kw: Any,
    ) -> Any:
        """Read what is noted on encoded features, and the layout of a prompt that is prefilled in chunks.

        Devices that features move between make new objects of them, without the notes. Each chunk of a prompt has its
        columns of the layout, and is a prompt of its own: nothing merges across chunks.
        """
        arguments = (input_ids, generation_config, model_kwargs, is_first_iteration)
        if self.disabled or not is_first_iteration:
            return original(*arguments, **kw)
        with _set(self._noted, _notes(model_kwargs)):
            if generation_config.prefill_chunk_size is None:
                return original(*arguments, **kw)
            past, mask = _length(model_kwargs.get("past_key_values")), model_kwargs.get("attention_mask")
            seen = past if isinstance(mask, Tensor) and mask.shape[1] == input_ids.shape[1] else 0
            whole = self._resolve(model_kwargs, input_ids[:, seen:])
            with _set(self._chunked, (self._take() if whole is None else whole, past)):
                return original(*arguments, **kw)

    def run_features(self, names: tuple[str, ...], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note on the features of videos or images what sizes they came with: `generate` encodes before it prefills."""
        out = original(*args, **kwargs)
        if hasattr(out, "pooler_output"):
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            sizes = {name: value for name, value in given.items() if isinstance(value, Tensor)}
            for name in sizes:
                if name.startswith("pixel_values"):
                    sizes[name] = torch.empty(sizes[name].shape, device="meta")
            setattr(out, SIZES, sizes)
        return out

    def run_expand(
        self, original: Callable[..., Any], input_ids: Tensor, encoded: dict[str, Any], expand_size: int = 1, **kw: Any
    ) -> Any:
        """Note on the features how often `generate` repeats them."""
        for features in encoded.values():
            if features is not None:
                setattr(features, REPEATS, expand_size)
        return original(input_ids, encoded, expand_size=expand_size, **kw)


def _notes(given: Mapping[str, Any]) -> Notes:
    encoded = given.get("mm_encoder_outputs") or {}
    sizes: dict[str, Any] = {}
    repeats = 1
    for features in encoded.values():
        sizes |= getattr(features, SIZES, {})
        repeats = getattr(features, REPEATS, repeats)
    return sizes, repeats


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
