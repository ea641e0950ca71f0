"""The two branches of one side of a layer, keys or values: latents of all tokens, exact recent ones (section 3.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cskv.storage import GrowingTensor, LatentStore, QuantizationPlan


class Branches:
    """Keys, or values, of one layer: all tokens as latents, the latest ones exactly as well.

    A side that is `lossless`, without factor and quantiser, keeps its exact tokens as the latents and needs no tail.
    """

    def __init__(self, rank: int | None, quantization: QuantizationPlan | None) -> None:
        self.lossless = rank is None and quantization is None
        self.store = LatentStore(quantization)
        # Exact tokens, (B, n, H_kv, D).
        self.tail = GrowingTensor()

    def append(self, latents: Tensor | None, exact: Tensor) -> None:
        """Add new tokens: latents (B, n, rank) where there is a factor, exact ones (B, H_kv, n, D)."""
        self.store.append(exact.transpose(1, 2).flatten(2) if latents is None else latents)
        if not self.lossless:
            rows = exact.transpose(1, 2)
            if self.tail.data is None:
                # A prompt is not copied: most of it is dropped at once.
                self.tail.adopt(rows)
            else:
                self.tail.append(rows)

    def columns(self, rebuilt: int, exact_from: int, rebuild: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens 0 .. rebuilt - 1 from latents, then tokens from `exact_from` on exactly; (B, H_kv, columns, D)."""
        if self.lossless:
            if rebuilt == exact_from:
                return rebuild(self.store.read())
            latents = self.store.read()
            return torch.cat((rebuild(latents[:, :rebuilt]), rebuild(latents[:, exact_from:])), dim=2)
        exact = self.exact(exact_from)
        return torch.cat((rebuild(self.store.read(rebuilt)), exact), dim=2) if rebuilt else exact.contiguous()

    def exact(self, begin: int) -> Tensor:
        """View (B, H_kv, n, D) of the exact tokens from place `begin` of the sequence on."""
        return self.tail.rows(self.tail.length - (self.store.length - begin)).transpose(1, 2)

    def keep_tail(self, length: int) -> None:
        """Keep only the latest `length` exact tokens."""
        if self.tail.length > length:
            self.tail.drop_front(self.tail.length - length)

    def remove(self, count: int) -> None:
        """Forget the latest `count` tokens."""
        self.store.truncate(self.store.length - count)
        self.tail.truncate(max(self.tail.length - count, 0))

    def clear(self) -> None:
        """Forget everything."""
        self.store.clear()
        self.tail.clear()

    def tensors(self) -> tuple[GrowingTensor, ...]:
        """All that is kept."""
        return *self.store.tensors(), self.tail

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind."""
        store = self.store
        return {"compressed": store.latent_nbytes, "tail": self.tail.nbytes, "metadata": store.metadata_nbytes}
