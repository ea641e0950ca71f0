"""Rows of cos and sin of the cached tokens, kept once for all layers of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from cskv.storage import GrowingTensor


class RotaryRows:
    """cos and sin (B or 1, T, D_rot) of every cached token, one copy on each device that layers live on.

    Kept, not recomputed: with left padding, YaRN, LongRoPE or multimodal positions a row cannot be told from its index.
    Most families repeat the angles in both halves of a row; then one half is kept.
    """

    def __init__(self) -> None:
        self._stores: dict[torch.device, tuple[GrowingTensor, GrowingTensor]] = {}
        self.repeats = False

    def extend(self, cos: Tensor, sin: Tensor, past: int) -> None:
        """Add the rows of new tokens behind the first `past`, unless another layer of this forward has."""
        room = self.reserve(cos, sin, past)
        if room is not None:
            cos, sin, cos_rows, sin_rows = room
            cos_rows.copy_(cos)
            sin_rows.copy_(sin)

    def reserve(self, cos: Tensor, sin: Tensor, past: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """What `extend` has to write, and where: cos, sin, and the places of cos and sin, all (B or 1, n, kept).

        None when another layer of this forward has added the rows.
        """
        stores = self._stores.setdefault(cos.device, (GrowingTensor(), GrowingTensor()))
        if stores[0].length == past + cos.shape[1]:
            return None
        if past == 0:
            half = cos.shape[-1] // 2
            self.repeats = all(torch.equal(one[..., :half], one[..., half:]) for one in (cos, sin))
        if stores[0].length != past:
            raise RuntimeError(
                f"the cache has rotary rows of {stores[0].length} tokens and {past} cached ones; a forward pass was "
                "interrupted. Reset the cache"
            )
        new, places = [], []
        for store, rows in zip(stores, (cos, sin), strict=True):
            if store.data is not None and store.data.shape[0] == 1 < rows.shape[0]:
                store.select(torch.zeros(rows.shape[0], dtype=torch.int64))
            batch = rows.shape[0] if store.data is None else store.data.shape[0]
            kept = rows.detach()[..., : rows.shape[-1] // 2] if self.repeats else rows.detach()
            new.append(kept.expand(batch, -1, -1))
            places.append(store.reserve(rows.shape[1], new[-1]))
        return new[0], new[1], places[0], places[1]

    def rows(self, device: torch.device, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, end, D_rot) of the first `end` tokens."""
        cos, sin = self.kept(device, end)
        return (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)) if self.repeats else (cos, sin)

    def kept(self, device: torch.device, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the first `end` tokens as they are kept: the first halves where the second repeat them."""
        cos, sin = (store.rows(0, end) for store in self._stores[device])
        return cos, sin

    def truncate(self, length: int) -> None:
        """Keep the rows of the first `length` tokens."""
        for store in self._all():
            store.truncate(length)

    def select(self, index: Tensor) -> None:
        """Take these batch rows, in this order."""
        for store in self._all():
            if store.data is not None and store.data.shape[0] > 1:
                store.select(index)

    def repeat(self, repeats: int) -> None:
        """Repeat every batch row; rows that all sequences share stay shared."""
        for store in self._all():
            if store.data is not None and store.data.shape[0] > 1:
                store.repeat(repeats)

    def clear(self) -> None:
        """Forget everything."""
        self._stores.clear()

    def _all(self) -> list[GrowingTensor]:
        return [store for pair in self._stores.values() for store in pair]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(store.nbytes for store in self._all())
