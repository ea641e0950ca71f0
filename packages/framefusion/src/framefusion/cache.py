"""Cache layers that hold fewer tokens than the sequence has, each its own number of them.

A reduced layer is the layer transformers made, of a class that also knows which tokens it holds. To the outside it has
the length of the sequence, so that `generate` slices its inputs and numbers positions as for the full one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from framefusion.errors import StaleCacheError, UnsupportedCacheError


@dataclass(eq=False)
class Applied:
    """Whether the handle that a cache depends on is still on its model."""

    removed: bool = False


@dataclass
class Incoming:
    """Tokens about to be added: `positions` (batch, n) int64 in the sequence, `valid` (batch, n) bool or None (all)."""

    positions: Tensor
    valid: Tensor | None
    length: int
    """Tokens of the sequence after them."""


class _Reduced(CacheLayerMixin):
    """What a reduced layer adds to a class of transformers."""

    # Annotated only: the layer is of two classes, and this one has no constructor of its own.
    applied: Applied
    positions: Tensor
    valid: Tensor | None
    length: int
    incoming: Incoming | None
    tail: int

    def begin(self, applied: Applied, positions: Tensor, valid: Tensor | None, length: int) -> None:
        """Take over a layer that holds the tokens at `positions` (batch, n) of a sequence of `length`."""
        self.applied, self.positions, self.valid, self.length = applied, positions, valid, length
        self.incoming = None
        self.tail = 0

    def check(self) -> None:
        """Raise `StaleCacheError` when the handle was removed."""
        if self.applied.removed:
            raise StaleCacheError(
                "FrameFusion was removed from the model; a cache it has reduced cannot go on. Start with a new cache"
            )

    def held(self) -> tuple[Tensor, Tensor | None]:
        """Positions (batch, n) int64 of all tokens held, and which of them are no padding; None: all."""
        positions, valid = self.positions, self.valid
        if self.tail:
            batch = positions.shape[0]
            last = torch.arange(self.length - self.tail, self.length, device=positions.device).expand(batch, -1)
            positions = torch.cat((positions, last), 1)
            if valid is not None:
                valid = torch.cat((valid, valid.new_ones(batch, self.tail)), 1)
        return positions, valid

    def take(self, count: int) -> None:
        """Note `count` added tokens, those announced or the next of the sequence."""
        self.check()
        new, self.incoming = self.incoming, None
        if new is None:
            self.tail += count
            self.length += count
            return
        positions, valid = self.held()
        if valid is not None or new.valid is not None:
            valid = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
            added = torch.ones_like(new.positions, dtype=torch.bool) if new.valid is None else new.valid
            valid = torch.cat((valid, added), 1)
        self.positions, self.valid, self.tail = torch.cat((positions, new.positions), 1), valid, 0
        self.length = new.length

    def over_batch(self, change: Any) -> None:
        """Apply `change` to all that has a row for each sequence."""
        self.positions = change(self.positions)
        self.valid = None if self.valid is None else change(self.valid)


class _ReducedDynamic(_Reduced):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.take(key_states.shape[-2])
        keys, values = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens of the sequence, whether held or not."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens held and new, and the offset 0."""
        return self.positions.shape[1] + self.tail + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.over_batch(lambda one: one.index_select(0, beam_idx.to(one.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.over_batch(lambda one: one.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.over_batch(lambda one: one[indices.to(one.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of the sequence, given as a negative number; those of a reduced prompt by position."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) is not valid: the tokens to remove, as a negative number")
        if tokens_to_remove == 0:
            return
        length = self.length + tokens_to_remove
        positions, valid = self.held()
        valid = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        stay = valid & (positions < length)
        count = positions.shape[1] - int((stay * torch.arange(1, positions.shape[1] + 1, device=stay.device)).max())
        if count:
            super().crop(-count)  # type: ignore[misc]
        end = positions.shape[1] - count
        self.positions, self.valid, self.tail, self.length = positions[:, :end], stay[:, :end], 0, max(length, 0)
        if bool(self.valid.all()):
            self.valid = None

    def reset(self) -> None:
        """Forget everything; the layer is then as transformers made it."""
        kind = type(self).__bases__[1]
        for name in ("applied", "positions", "valid", "length", "incoming", "tail"):
            self.__dict__.pop(name, None)
        self.__class__ = kind  # type: ignore[assignment]
        self.reset()


class _ReducedStatic(_Reduced):
    """A static layer: its first `positions.shape[1]` slots hold the prompt, the tokens after it follow them."""

    missing: Tensor
    slots: Tensor | None

    def begin(self, applied: Applied, positions: Tensor, valid: Tensor | None, length: int) -> None:
        super().begin(applied, positions, valid, length)
        self.missing = torch.zeros((), dtype=torch.int64, device=positions.device)
        self._describe()

    def _describe(self) -> None:
        self.missing.fill_(self.length - self.positions.shape[1])
        self.slots = None
        if self.valid is not None:
            room = self.max_cache_len - self.valid.shape[1]  # type: ignore[attr-defined]
            self.slots = torch.nn.functional.pad(self.valid, (0, room), value=True)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Only the prompt is announced; what follows must stay traceable, with nothing on the host that changes.
        if self.incoming is not None:
            self.take(key_states.shape[-2])
            self._describe()
        keys, values = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        return keys, values

    def get_seq_length(self) -> Any:
        """Tokens of the sequence, as a tensor."""
        held = super().get_seq_length()  # type: ignore[misc]
        return held + self.missing if isinstance(held, Tensor) else self.length

    def decode_mask(self, queries: int) -> Tensor:
        """(batch or 1, 1, queries, slots) bool: what the coming tokens see, themselves included."""
        held = self.cumulative_length  # type: ignore[attr-defined]
        slot = torch.arange(self.max_cache_len, device=held.device)  # type: ignore[attr-defined]
        mask = (slot <= held + torch.arange(queries, device=held.device)[:, None])[None, None]
        return mask if self.slots is None else mask & self.slots[:, None, None, :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.over_batch(lambda one: one.index_select(0, beam_idx.to(one.device)))
        self.slots = None if self.slots is None else self.slots.index_select(0, beam_idx.to(self.slots.device))

    def reset(self) -> None:
        """Forget everything; the layer is then as transformers made it."""
        kind = type(self).__bases__[1]
        for name in ("applied", "positions", "valid", "length", "incoming", "tail", "missing", "slots"):
            self.__dict__.pop(name, None)
        self.__class__ = kind  # type: ignore[assignment]
        self.reset()


@functools.cache
def _reduced_class(kind: type, added: type) -> type:
    return type(f"Reduced{kind.__name__}", (added, kind), {})


def is_reduced(layer: Any) -> bool:
    """Whether a cache layer holds fewer tokens than the sequence may have."""
    return isinstance(layer, _Reduced)


def is_static(layer: Any) -> bool:
    """Whether a layer has its room from the start."""
    return isinstance(layer, StaticLayer)


def check_cache(cache: Cache) -> None:
    """Raise `UnsupportedCacheError` unless every layer of a cache can hold its own number of tokens."""
    if cache.layer_class_to_replicate is not None and not issubclass(cache.layer_class_to_replicate, DynamicLayer):
        raise _unsupported(cache, cache.layer_class_to_replicate)
    for layer in cache.layers:
        kind = type(layer)
        attends = not isinstance(layer, LinearAttentionLayer) and hasattr(layer, "keys")
        if isinstance(layer, StaticSlidingWindowLayer) or (
            attends and not isinstance(layer, DynamicLayer | StaticLayer)
        ):
            raise _unsupported(cache, kind)


def _unsupported(cache: Cache, kind: type) -> UnsupportedCacheError:
    return UnsupportedCacheError(
        f"past_key_values is a {type(cache).__name__} with layers of {kind.__name__}, which all hold the same tokens. "
        "Pass a DynamicCache, a QuantizedCache, or a StaticCache of a model without sliding windows"
    )


def adopt(cache: Cache, layers: int, applied: Applied, positions: Tensor, valid: Tensor | None) -> None:
    """Let all attention layers of a cache hold numbers of tokens of their own.

    A layer with content holds the first tokens of the sequence that `positions` (batch, n) and `valid` describe, or the
    last of these where it has a window.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < layers:
            cache.layers.append(cache.layer_class_to_replicate())
        cache.layer_class_to_replicate = None
    for index, layer in enumerate(cache.layers):
        if is_reduced(layer) or isinstance(layer, LinearAttentionLayer) or not hasattr(layer, "keys"):
            continue
        held = int(layer.get_seq_length()) if layer.is_initialized else 0
        first = 0
        if isinstance(layer, DynamicSlidingWindowLayer):
            first = held - layer.keys.shape[-2] if layer.is_initialized else 0
            # Its window would count tokens that are there, not the distance in the sequence; the mask does that.
            plain = DynamicLayer()
            vars(plain).update({name: value for name, value in vars(layer).items() if name in _KEPT})
            cache.layers[index] = layer = plain
        static = isinstance(layer, StaticLayer)
        kind: Any = type(layer)
        layer.__class__ = _reduced_class(kind, _ReducedStatic if static else _ReducedDynamic)
        layer.begin(applied, positions[:, first:held], None if valid is None else valid[:, first:held], held)


_KEPT = ("keys", "values", "is_initialized", "dtype", "device")


def is_empty(cache: Cache) -> bool:
    """Whether no token has been added to a cache."""
    if any(is_reduced(layer) for layer in cache.layers):
        return False
    return not any(getattr(layer, "is_initialized", False) for layer in cache.layers) or not _length(cache)


def _length(cache: Cache) -> int:
    found = cache.get_seq_length()
    return int(found)


def snapshot(cache: Cache) -> Any:
    """What `restore` needs to take back the tokens that are added from now on; dynamic layers alone."""
    return (
        cache.layers[:],
        [(layer, type(layer), dict(vars(layer))) for layer in cache.layers],
        cache.layer_class_to_replicate,
    )


def restore(cache: Cache, saved: Any) -> None:
    """Take back what was added since `snapshot`. A static layer writes in place: it is emptied."""
    layers, contents, kind = saved
    for layer, before, attributes in contents:
        if isinstance(layer, StaticLayer):
            layer.__class__ = before
            if layer.is_initialized:
                layer.keys.zero_()
                layer.values.zero_()
                layer.cumulative_length.zero_()
            continue
        layer.__class__ = before
        vars(layer).clear()
        vars(layer).update(attributes)
    cache.layers[:] = layers
    cache.layer_class_to_replicate = kind


def new_cache(config: Any) -> DynamicCache:
    """The cache that the model would make for itself."""
    return DynamicCache(config=config)
