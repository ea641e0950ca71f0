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
        self._repeats = False

    def extend(self, cos: Tensor, sin: Tensor, past: int) -> None:
        """Add the rows of new tokens behind the first `past`, unless another layer of this forward has."""
        stores = self._stores.setdefault(cos.device, (GrowingTensor(), GrowingTensor()))
        if stores[0].length == past + cos.shape[1]:
            return
        if past == 0:
            half = cos.shape[-1] // 2
            self._repeats = all(torch.equal(one[..., :half], one[..., half:]) for one in (cos, sin))
        if stores[0].length != past:
            raise RuntimeError(
                f"the cache has rotary rows of {stores[0].length} tokens and {past} cached ones; a forward pass was "
                "interrupted. Reset the cache"
            )
        for store, rows in zip(stores, (cos, sin), strict=True):
            if store.data is not None and store.data.shape[0] == 1 < rows.shape[0]:
                store.select(torch.zeros(rows.shape[0], dtype=torch.int64))
            batch = rows.shape[0] if store.data is None else store.data.shape[0]
            kept = rows.detach()[..., : rows.shape[-1] // 2] if self._repeats else rows.detach()
            store.append(kept.expand(batch, -1, -1))

    def rows(self, device: torch.device, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the first `end` tokens."""
        cos, sin = (store.rows(0, end) for store in self._stores[device])
        return (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)) if self._repeats else (cos, sin)

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
