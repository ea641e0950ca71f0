"""`TokenLayout`: which positions of a sequence are vision tokens, of which video, frame and place in the frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framefusion.errors import LayoutError


@dataclass(frozen=True)
class VideoBlock:
    """A video in a sequence: `frames` frames of `patches` tokens each from `start` on, `gap` other tokens between."""

    start: int
    frames: int
    patches: int
    gap: int = 0

    @classmethod
    def llava_video(cls, start: int, frames: int, side: int = 14) -> VideoBlock:
        """LLaVA-Video's frames: `side` rows of `side` patches and a newline token, which counts as a patch."""
        return cls(start, frames, side * (side + 1))


@dataclass(frozen=True)
class TokenLayout:
    """For every position of a batch of sequences: `patch`, the place in its frame; `frame`; `stream`, the video.

    All three (batch, tokens) int64, -1 where the position is no vision token. Nothing merges across streams.
    """

    patch: Tensor
    frame: Tensor
    stream: Tensor

    @classmethod
    def empty(cls, batch: int, tokens: int) -> TokenLayout:
        """A layout without vision tokens."""
        return cls(*(torch.full((batch, tokens), -1) for _ in range(3)))

    @classmethod
    def from_blocks(cls, tokens: int, *rows: Sequence[VideoBlock]) -> TokenLayout:
        """A layout of sequences of `tokens` positions from the videos of each row.

        Raises `LayoutError` for a block that overlaps another or does not fit.
        """
        layout = cls.empty(len(rows), tokens)
        for row, blocks in enumerate(rows):
            for stream, block in enumerate(blocks):
                step = block.patches + block.gap
                first = block.start + step * torch.arange(block.frames)
                places = (first[:, None] + torch.arange(block.patches)).flatten()
                end = block.start + step * block.frames - block.gap
                if min(block.start, block.gap) < 0 or min(block.frames, block.patches) < 1 or end > tokens:
                    raise LayoutError(f"{block} is not valid: a block inside the {tokens} tokens of the sequence")
                if bool((layout.patch[row, places] >= 0).any()):
                    raise LayoutError(f"{block} is not valid: it overlaps another block of row {row}")
                layout.place(row, places, block.patches, stream)
        return layout

    def place(self, row: int, places: Tensor, patches: int, stream: int) -> None:
        """Enter the tokens of one video at `places` (count,) int64, `patches` to the frame; while it is being built."""
        count = torch.arange(len(places))
        self.patch[row, places] = count % patches
        self.frame[row, places] = count // patches
        self.stream[row, places] = stream

    @property
    def has_vision(self) -> bool:
        """Whether there is any vision token."""
        return bool((self.patch >= 0).any())

    def to(self, device: torch.device) -> TokenLayout:
        """The layout on another device."""
        return TokenLayout(*(one.to(device) for one in (self.patch, self.frame, self.stream)))

    def columns(self, start: int, count: int) -> TokenLayout:
        """The layout of `count` positions from `start` on; frames keep their numbers, in part where they are cut."""
        return TokenLayout(*(one[:, start : start + count] for one in (self.patch, self.frame, self.stream)))

    def fit(self, batch: int, tokens: int) -> TokenLayout:
        """The layout for a batch that `generate` has repeated, row by row.

        Raises `LayoutError` when it is not for sequences of this many tokens.
        """
        rows, length = self.patch.shape
        if length != tokens or batch % rows:
            raise LayoutError(
                f"layout has shape {(rows, length)}; valid: {(batch, tokens)}, batch and tokens of the input"
            )
        if rows == batch:
            return self
        return TokenLayout(*(one.repeat_interleave(batch // rows, 0) for one in (self.patch, self.frame, self.stream)))

    def check(self) -> None:
        """Raise `LayoutError` unless shapes, types and values are those of a layout."""
        shape = tuple(self.patch.shape)
        for name in ("patch", "frame", "stream"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.ndim != 2:
                found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
                raise LayoutError(f"{name} is {found}; valid: an int64 tensor (batch, tokens)")
            if tuple(value.shape) != shape or value.device != self.patch.device:
                raise LayoutError(
                    f"{name} has shape {tuple(value.shape)} on {value.device}; valid: {shape} on {self.patch.device}, "
                    "as patch"
                )
            if bool((value < -1).any()):
                raise LayoutError(f"{name} has {int(value.min())}; valid: numbers from 0, or -1 outside")
        inside = self.patch >= 0
        if not (inside.equal(self.frame >= 0) and inside.equal(self.stream >= 0)):
            raise LayoutError("patch, frame and stream disagree on which positions are vision tokens; valid: -1 in all")
        for row in range(shape[0]):
            keys = torch.stack([getattr(self, name)[row][inside[row]] for name in ("stream", "frame", "patch")], 1)
            if len(keys) != len(keys.unique(dim=0)):
                raise LayoutError(f"patch repeats a number within one frame of row {row}; valid: each one once")


LayoutResolver = Callable[[Mapping[str, Any]], "TokenLayout | None"]
"""Takes the arguments of the model's forward by name and returns the layout of the prompt, or None without video."""
