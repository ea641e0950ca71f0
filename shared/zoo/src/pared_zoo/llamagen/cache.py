"""Keys and values of a picture whose length is known: written in place, read as a view."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """A ``DynamicLayer`` with room for all tokens, so that a new one is written and not the whole layer copied.

    Args:
        room: most tokens it can hold.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        shape = (*key_states.shape[:2], self.room, key_states.shape[-1])
        self._keys, self._values = key_states.new_empty(shape), value_states.new_empty(shape)
        self.keys, self.values = self._keys[:, :, :0], self._values[:, :, :0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (rows, heads, tokens, width) and return all there are, as views.

        Raises:
            ValueError: if there is no room for them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.keys.shape[2]
        end = begin + key_states.shape[2]
        if end > self.room:
            raise ValueError(
                f"key_states has {key_states.shape[2]} tokens; {self.room - begin} of {self.room} are free"
            )
        self._keys[:, :, begin:end] = key_states
        self._values[:, :, begin:end] = value_states
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values


class GrowingCache(Cache):
    """A cache of ``layers`` layers with room for ``room`` tokens each."""

    def __init__(self, layers: int, room: int) -> None:
        super().__init__(layers=[GrowingLayer(room) for _ in range(layers)])
