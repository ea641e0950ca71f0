"""Where cached tokens lie: tensors that grow in place, and latents of which the older ones are quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pared_kernels import QuantizedLatents, cskv_quant_flush
from torch import Tensor

from cskv.functional import BEYOND_FLOAT16, Axis, Packed, PackedMeta, dequantize

SLACK_SHARE, LEAST_SLACK, MOST_SLACK = 16, 8, 1024
"""Free rows after growing: a sixteenth of those in use, within these bounds. The first rows are stored without any."""


class GrowingTensor:
    """Rows (batch, rows, ...), appended in place and forgotten at both ends; copied only when room is used up."""

    def __init__(self) -> None:
        self.data: Tensor | None = None
        self.begin = 0
        self.length = 0

    def adopt(self, rows: Tensor) -> None:
        """Begin with `rows` (batch, n, ...) themselves, not a copy of them; only while there are no rows."""
        self.data, self.begin, self.length = rows, 0, rows.shape[1]

    def append(self, rows: Tensor) -> None:
        """Add `rows` (batch, n, ...) at the end."""
        self.reserve(rows.shape[1], rows).copy_(rows)

    def reserve(self, count: int, like: Tensor) -> Tensor:
        """Add `count` rows like those of `like` (batch, any, ...) at the end; the caller writes what is returned."""
        needed = self.length + count
        if self.data is None or self.begin + needed > self.data.shape[1]:
            slack = 0 if self.data is None else min(max(needed // SLACK_SHARE, LEAST_SLACK), MOST_SLACK)
            grown = like.new_empty((like.shape[0], needed + slack, *like.shape[2:]))
            if self.data is not None:
                grown[:, : self.length] = self.rows()
            self.data, self.begin = grown, 0
        self.length = needed
        return self.rows(needed - count)

    def rows(self, begin: int = 0, end: int | None = None) -> Tensor:
        """View of the rows begin .. end - 1; all to the end by default. Only after the first `append`."""
        assert self.data is not None
        return self.data[:, self.begin + begin : self.begin + (self.length if end is None else end)]

    def drop_front(self, count: int) -> None:
        """Forget the first `count` rows; their room is given back when it is more than the others take."""
        self.begin, self.length = self.begin + count, self.length - count
        if self.data is not None and self.data.shape[1] - self.length > max(self.length, 2 * LEAST_SLACK):
            self.data, self.begin = self.rows().clone(memory_format=torch.contiguous_format), 0

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows."""
        self.length = min(self.length, length)

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
        self.data, self.begin, self.length = None, 0, 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated, free rows included."""
        return 0 if self.data is None else self.data.untyped_storage().nbytes()


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
        self._dtype, self._channels = torch.float32, 0

    def append(self, latents: Tensor) -> None:
        """Add latents (batch, n, channels)."""
        self.reserve(latents.shape[1], latents).copy_(latents)

    def reserve(self, count: int, like: Tensor) -> Tensor:
        """Add `count` latents like those of `like` (batch, any, channels), and return them for the caller to write."""
        self.length += count
        return self.raw.reserve(count, like)

    def quantize(self, limit: int, touching: bool = False) -> None:
        """Quantise the whole groups of tokens below `limit`, or also one that `limit` cuts; without a plan, nothing."""
        if self.plan is None:
            return
        plan = self.plan
        whole = self._whole(min(self._whole(limit, up=touching), self.length)) - self.codes.length
        if whole <= 0:
            return
        latents = self.raw.rows(0, whole)
        self._pack_in_place(latents)
        self._dtype, self._channels = latents.dtype, latents.shape[2]
        self.latest.clear()
        self.latest.append(self.raw.rows(whole - plan.tokens, whole))
        self.raw.drop_front(whole)

    def _pack_in_place(self, latents: Tensor) -> None:
        """Codes, scales and offsets of `functional.quantize`, written straight to where they are kept."""
        assert self.plan is not None
        plan, (batch, tokens, channels) = self.plan, latents.shape
        per_token = plan.axis == "token"
        groups = (tokens, channels // plan.channels) if per_token else (tokens // plan.tokens, channels)
        codes = latents.new_empty((batch, 0, -(-channels * plan.bits // 8)), dtype=torch.uint8)
        parameter = latents.new_empty((batch, 0, groups[1]), dtype=torch.float16)
        written = [
            store.reserve(count, like)
            for store, count, like in (
                (self.codes, tokens, codes),
                (self.scale, groups[0], parameter),
                (self.offset, groups[0], parameter),
            )
        ]
        cskv_quant_flush(
            latents,
            *written,
            bits=plan.bits,
            group=plan.group_size,
            per_token=per_token,
            clamped=plan.zero_point == "clamped",
        )
        if not bool(torch.isfinite(written[1]).all() & torch.isfinite(written[2]).all()):
            for store, rows in zip((self.codes, self.scale, self.offset), written, strict=True):
                store.truncate(store.length - rows.shape[1])
            raise ValueError(BEYOND_FLOAT16)

    def parts(self, end: int) -> tuple[Tensor, QuantizedLatents | None]:
        """The first `end` latents as they lie: those that are not quantised, and the quantised ones before them."""
        quantised = min(self.codes.length, end)
        raw = self.raw.rows(0, end - quantised)
        if quantised == 0:
            return raw, None
        assert self.plan is not None
        rows = -(-quantised // self._tokens_per_row)
        parameters = self.scale.rows(0, rows), self.offset.rows(0, rows)
        return raw, QuantizedLatents(self.codes.rows(0, quantised), *parameters, self.plan.bits, self.plan.group_size)

    @property
    def _tokens_per_row(self) -> int:
        """Tokens that share a row of scales."""
        return self.plan.tokens if self.plan is not None and self.plan.axis == "channel" else 1

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
        plan, per_row, codes = self.plan, self._tokens_per_row, self.codes.rows(begin, end)
        scale, offset = (store.rows(begin // per_row, end // per_row) for store in (self.scale, self.offset))
        shape = (*codes.shape[:2], self._channels)
        meta = PackedMeta(shape, plan.bits, plan.axis, plan.group_size, plan.zero_point, self._dtype)
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
            self.codes.truncate(whole)
            for store in (self.scale, self.offset):
                store.truncate(whole // self._tokens_per_row)
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
