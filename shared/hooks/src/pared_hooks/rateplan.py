"""`RatePlan`: which stretches of a video run at a lower frame rate, as vgdfr writes it and dlfr-vae reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pared_hooks.config import Config
from pared_hooks.errors import ConfigError


@dataclass(frozen=True)
class RatePlan(Config):
    """Frame-rate plan of one video, JSON schema `pared.rateplan/1`.

    Frame 0 stands alone, as in causal video autoencoders; after it `stride` frames make one latent. A segment
    `(start, length, rate)` covers the frames `start .. start + length - 1` and merges every `rate` consecutive ones
    into one, so that `rate` latents become one. Segments are sorted, do not overlap or touch frame 0, start where a
    latent starts, and are multiples of `stride * rate` long; frames outside them keep the full rate.

    Raises `ConfigError` when a rule is broken. Frame and latent ids count from 0 in the original video.
    """

    schema: ClassVar[str | None] = "pared.rateplan/1"

    num_frames: int
    stride: int = 4
    segments: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.stride >= 1, "stride", self.stride, "an integer >= 1")
        below = self.num_frames - (self.num_frames - 1) % self.stride
        self.check(
            self.num_frames >= 1 and below == self.num_frames,
            "num_frames",
            self.num_frames,
            f"1 plus a multiple of stride {self.stride}, such as {max(below, 1)} or {max(below, 1) + self.stride}",
        )
        free = 1
        for start, length, rate in self.segments:
            where = (start, length, rate)
            self.check(rate >= 2, "segments", where, "rate >= 2")
            self.check(start >= free, "segments", where, f"sorted and disjoint, so start >= {free}")
            self.check(
                (start - 1) % self.stride == 0, "segments", where, f"start of 1 plus a multiple of {self.stride}"
            )
            self.check(
                length > 0 and length % (self.stride * rate) == 0,
                "segments",
                where,
                f"length a multiple of stride * rate = {self.stride * rate}",
            )
            self.check(start + length <= self.num_frames, "segments", where, f"an end within {self.num_frames} frames")
            free = start + length

    @classmethod
    def from_chunks(cls, num_frames: int, chunk: int, rates: Sequence[int], stride: int = 4) -> RatePlan:
        """Plan with one rate for each whole chunk of `chunk` frames after frame 0; what is left keeps the full rate."""
        if chunk < 1 or len(rates) != (num_frames - 1) // chunk:
            raise ConfigError(
                f"rates = {tuple(rates)} is not valid: one for each of the {(num_frames - 1) // max(chunk, 1)} whole "
                f"chunks of {chunk} frames",
                "rates",
            )
        starts = [1 + index * chunk for index in range(len(rates))]
        return cls(num_frames, stride, tuple((s, chunk, r) for s, r in zip(starts, rates, strict=True) if r != 1))

    def rates(self, chunk: int) -> tuple[int, ...]:
        """Rate of each whole chunk of `chunk` frames; raises `ConfigError` when a chunk has more than one rate."""
        by_frame = [1] * self.num_frames
        for start, length, rate in self.segments:
            by_frame[start : start + length] = [rate] * length
        chunks = [set(by_frame[1 + index * chunk :][:chunk]) for index in range((self.num_frames - 1) // chunk)]
        tail = set(by_frame[1 + len(chunks) * chunk :])
        if any(len(found) > 1 for found in chunks) or tail - {1}:
            raise ConfigError(
                f"chunk = {chunk} is not valid: the segments {self.segments} cut through its chunks", "chunk"
            )
        return tuple(found.pop() for found in chunks)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Ids of the frames that become one frame, for every merged frame."""
        return tuple(
            tuple(range(first, first + rate))
            for start, length, rate in self.segments
            for first in range(start, start + length, rate)
        )

    @property
    def frame_keep(self) -> tuple[int, ...]:
        """Ids of the frames that remain; a merged frame has the id of its group's first."""
        dropped = {frame for group in self.groups for frame in group[1:]}
        return tuple(frame for frame in range(self.num_frames) if frame not in dropped)

    @property
    def latent_keep(self) -> tuple[int, ...]:
        """Ids of the latents that remain: of a segment at rate r every r-th."""
        dropped = {
            1 + (start - 1) // self.stride + index
            for start, length, rate in self.segments
            for index in range(length // self.stride)
            if index % rate
        }
        return tuple(latent for latent in range(self.num_original_latents) if latent not in dropped)

    @property
    def num_original_latents(self) -> int:
        """Latents of the video at full rate."""
        return 1 + (self.num_frames - 1) // self.stride

    @property
    def num_latents(self) -> int:
        """Latents that remain."""
        return len(self.latent_keep)

    @property
    def frame_ratio(self) -> float:
        """Share of the frames that remain."""
        return len(self.frame_keep) / self.num_frames

    @property
    def latent_ratio(self) -> float:
        """Share of the latents that remain."""
        return self.num_latents / self.num_original_latents

    def times(self) -> tuple[float, ...]:
        """Moment that each remaining frame shows, in frames: the centre of its group."""
        centre = {group[0]: sum(group) / len(group) for group in self.groups}
        return tuple(centre.get(frame, float(frame)) for frame in self.frame_keep)
