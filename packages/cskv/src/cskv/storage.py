"""Where cached tokens lie: tensors that grow in place, and latents of which the older ones are quantised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cskv.functional import Axis, Packed, PackedMeta, dequantize, quantize

SLACK_SHARE, LEAST_SLACK, MOST_SLACK = 16, 8, 1024
"""Free rows after growing: a sixteenth of those in use, within these bounds. The first rows are stored without any."""


class GrowingTensor:
    """Rows (batch, rows, ...) that are appended in place; copied only when the capacity is exceeded."""

    def __init__(self) -> None:
        self.data: Tensor | None = None
        self.length = 0

    def append(self, rows: Tensor) -> None:
        """Add `rows` (batch, n, ...) at the end."""
        needed = self.length + rows.shape[1]
        if self.data is None or needed > self.data.shape[1]:
            slack = 0 if self.data is None else min(max(needed // SLACK_SHARE, LEAST_SLACK), MOST_SLACK)
            grown = rows.new_empty((rows.shape[0], needed + slack, *rows.shape[2:]))
            if self.data is not None:
                grown[:, : self.length] = self.data[:, : self.length]
            self.data = grown
        self.data[:, self.length : needed] = rows
        self.length = needed

    def rows(self, begin: int = 0, end: int | None = None) -> Tensor:
        """View of the rows begin .. end - 1; all to the end by default. Only after the first `append`."""
        assert self.data is not None
        return self.data[:, begin : self.length if end is None else end]

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows."""
        self.length = min(self.length, length)

    def drop_front(self, count: int) -> None:
        """Forget the first `count` rows and give back what is not needed for the others."""
        kept = self.rows(count).clone()
        self.data, self.length = None, 0
        self.append(kept)

    def select(self, index: Tensor) -> None:
        """Take these batch rows, in this order."""
        if self.data is not None:
            self.data = self.data.index_select(0, index.to(self.data.device))

    def repeat(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        if self.data is not None:
            self.data = self.data.repeat_interleave(repeats, dim=0)

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        if self.data is not None:
            self.data = self.data.to(device, non_blocking=True)

    def clear(self) -> None:
        """Forget all rows."""
        self.data, self.length = None, 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated, free rows included."""
        return 0 if self.data is None else self.data.nbytes


@dataclass(frozen=True)
class QuantizationPlan:
    """How latents are quantised: `tokens` at a time; groups over those tokens or over `channels` of one token."""

    bits: int
    axis: Axis
    tokens: int
    channels: int
    zero_point: Literal["affine", "clamped"]

    @property
    def group_size(self) -> int:
        """Size of a group along its axis."""
        return self.tokens if self.axis == "channel" else self.channels


class LatentStore:
    """Latents (batch, tokens, channels) of all tokens; with a plan, whole groups of them can be kept quantised."""

    def __init__(self, plan: QuantizationPlan | None) -> None:
        self.plan = plan
        self.raw = GrowingTensor()
        self.codes, self.scale, self.offset = GrowingTensor(), GrowingTensor(), GrowingTensor()
        # The latest quantised group as it was, for a truncation that cuts it.
        self.latest = GrowingTensor()
        self.length = 0
        self._meta: PackedMeta | None = None

    def append(self, latents: Tensor) -> None:
        """Add latents (batch, n, channels)."""
        self.raw.append(latents)
        self.length += latents.shape[1]

    def quantize(self, limit: int, touching: bool = False) -> None:
        """Quantise the whole groups of tokens below `limit`, or also one that `limit` cuts; without a plan, nothing."""
        if self.plan is None:
            return
        plan = self.plan
        whole = self._whole(min(self._whole(limit, up=touching), self.length)) - self.codes.length
        if whole <= 0:
            return
        packed = quantize(
            self.raw.rows(0, whole),
            bits=plan.bits,
            axis=plan.axis,
            group_size=plan.group_size,
            zero_point=plan.zero_point,
        )
        self._meta = packed.meta
        for store, rows in ((self.codes, packed.codes), (self.scale, packed.scale), (self.offset, packed.offset)):
            store.append(rows)
        self.latest.clear()
        self.latest.append(self.raw.rows(whole - plan.tokens, whole))
        self.raw.drop_front(whole)

    def read(self, end: int | None = None) -> Tensor:
        """The first `end` latents (batch, end, channels), all by default; a view where nothing is quantised."""
        end = self.length if end is None else end
        quantised = self.codes.length
        if quantised == 0:
            return self.raw.rows(0, end)
        values = self._dequantized(0, self._whole(min(end, quantised), up=True))[:, :end]
        return torch.cat((values, self.raw.rows(0, end - quantised)), dim=1) if end > quantised else values

    def _dequantized(self, begin: int, end: int) -> Tensor:
        """Quantised latents begin .. end - 1, both multiples of the plan's tokens."""
        assert self.plan is not None
        assert self._meta is not None
        codes = self.codes.rows(begin, end)
        per_row = self.plan.tokens if self.plan.axis == "channel" else 1
        scale, offset = (store.rows(begin // per_row, end // per_row) for store in (self.scale, self.offset))
        meta = replace(self._meta, shape=(*codes.shape[:2], self._meta.shape[-1]))
        return dequantize(Packed(codes, scale, offset, meta))

    def _whole(self, tokens: int, up: bool = False) -> int:
        assert self.plan is not None
        return -(-tokens // self.plan.tokens) * self.plan.tokens if up else tokens - tokens % self.plan.tokens

    def truncate(self, length: int) -> None:
        """Keep the first `length` latents; a group that is cut becomes unquantised, exactly if it is the latest."""
        if length >= self.length:
            return
        quantised = self.codes.length
        if length >= quantised:
            self.raw.truncate(length - quantised)
        else:
            assert self.plan is not None
            whole = self._whole(length)
            cut = None
            if length > whole:
                is_latest = whole + self.plan.tokens == quantised and self.latest.length
                group = self.latest.rows() if is_latest else self._dequantized(whole, whole + self.plan.tokens)
                cut = group[:, : length - whole].clone()
            self.raw.truncate(0)
            self.latest.clear()
            per_row = self.plan.tokens if self.plan.axis == "channel" else 1
            self.codes.truncate(whole)
            for store in (self.scale, self.offset):
                store.truncate(whole // per_row)
            if cut is not None:
                self.raw.append(cut)
        self.length = length

    def tensors(self) -> tuple[GrowingTensor, ...]:
        """All stores: latents that are not quantised, those of the latest group, codes, scales, offsets."""
        return self.raw, self.latest, self.codes, self.scale, self.offset

    def clear(self) -> None:
        """Forget everything."""
        for store in self.tensors():
            store.clear()
        self.length = 0

    @property
    def metadata_nbytes(self) -> int:
        """Bytes of scales and offsets."""
        return self.scale.nbytes + self.offset.nbytes

    @property
    def latent_nbytes(self) -> int:
        """Bytes of codes and of latents that are not quantised."""
        return self.raw.nbytes + self.latest.nbytes + self.codes.nbytes
