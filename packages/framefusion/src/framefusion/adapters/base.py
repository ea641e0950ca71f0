"""What resolvers share: the registry by class name, and walks over the vision tokens of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from framefusion.config import FrameFusionConfig
from framefusion.errors import LayoutError
from framefusion.layout import TokenLayout

Resolver = Callable[[nn.Module, FrameFusionConfig, Mapping[str, Any]], TokenLayout | None]
"""(inner model, configuration, arguments of its forward) -> layout on the CPU, None without vision tokens."""

MORE_TEXT = 4
"""Tokens by which the text between two frames may vary, such as the digits of a frame's number or time."""

RESOLVERS: dict[str, Resolver] = {}


def resolver(*classes: str) -> Callable[[Resolver], Resolver]:
    """Register a resolver for the inner models of these class names, which hold the decoder and the vision tower."""

    def register(function: Resolver) -> Resolver:
        RESOLVERS.update(dict.fromkeys(classes, function))
        return function

    return register


def find_resolver(model: nn.Module) -> Resolver | None:
    """The resolver of a model's class or one of its bases."""
    return next((RESOLVERS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in RESOLVERS), None)


def placeholders(input_ids: Tensor, token: int | None) -> Tensor:
    """(batch, tokens) bool on the CPU: where the placeholder is."""
    if token is None:
        return torch.zeros(input_ids.shape, dtype=torch.bool)
    return (input_ids == token).cpu()


def require_sizes(inputs: Mapping[str, Any], *names: str) -> list[Tensor]:
    """The tensors of these names. Raises `LayoutError` when the prompt has vision tokens and one is missing."""
    found = [inputs.get(name) for name in names]
    missing = [name for name, value in zip(names, found, strict=True) if not isinstance(value, Tensor)]
    if missing:
        raise LayoutError(
            f"{missing[0]} is missing although the prompt has vision tokens: where their frames begin is unknown. Pass "
            "it, or call handle.set_layout(...) before, for every part of a prompt that is cut by hand"
        )
    return [value for value in found if isinstance(value, Tensor)]


def split_rows(where: Tensor, lengths: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield (row, places) of videos that fill the places of a batch one after the other, `lengths` tokens each.

    Raises `LayoutError` when a video would not end with its row or tokens and lengths do not add up.
    """
    rows = [row.nonzero().flatten() for row in where]
    row, start = 0, 0
    for length in lengths:
        while row < len(rows) and start == len(rows[row]):
            row, start = row + 1, 0
        if row == len(rows) or start + length > len(rows[row]):
            total = int(where.sum())
            raise LayoutError(
                f"the prompt has {total} vision tokens, which does not fit the videos' sizes: one of {length} tokens "
                "does not end inside its row. Pass what the processor returned, or an explicit layout"
            )
        yield row, rows[row][start : start + length]
        start += length
    rest = len(rows[row]) - start if row < len(rows) else 0
    if rest + sum(len(one) for one in rows[row + 1 :]):
        raise LayoutError("the prompt has more vision tokens than its videos; pass what the processor returned")


def runs(where: Tensor) -> list[tuple[int, int]]:
    """(start, length) of the runs of true in (tokens,) bool."""
    edges = torch.nn.functional.pad(where.to(torch.int8), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return [(int(start), int(end - start)) for start, end in zip(starts, ends, strict=True)]


def frames_from_runs(where: Tensor) -> TokenLayout | None:
    """A layout in which consecutive runs of equal length are the frames of one video; (batch, tokens) bool.

    Text between two runs that is much longer than that between the first two begins another video. A video needs two
    frames. None when there are none.
    """
    layout = TokenLayout.empty(*where.shape)
    for row, line in enumerate(where):
        groups: list[list[tuple[int, int]]] = []
        for start, length in runs(line):
            if groups and groups[-1][-1][1] == length and _continues(groups[-1], start):
                groups[-1].append((start, length))
            else:
                groups.append([(start, length)])
        for stream, frames in enumerate(group for group in groups if len(group) > 1):
            places = torch.cat([torch.arange(start, start + size) for start, size in frames])
            layout.place(row, places, frames[0][1], stream)
    return layout if layout.has_vision else None


def _continues(frames: list[tuple[int, int]], start: int) -> bool:
    """Whether a run at `start` belongs to the video of these runs (start, length)."""
    if len(frames) < 2:
        return True
    (first, length), second = frames[0], frames[1][0]
    usual = second - first - length
    return start - frames[-1][0] - length <= 2 * usual + MORE_TEXT


def append(layout: TokenLayout | None, other: TokenLayout | None) -> TokenLayout | None:
    """Both layouts in one, which have no position in common; streams of the second are numbered after the first."""
    if layout is None or other is None:
        return layout or other
    after = layout.stream.amax(1, keepdim=True) + 1
    second = other.patch >= 0
    return TokenLayout(
        torch.where(second, other.patch, layout.patch),
        torch.where(second, other.frame, layout.frame),
        torch.where(second, other.stream + after, layout.stream),
    )


def image_frames(where: Tensor, sizes: list[tuple[int, ...]], lengths: list[int]) -> TokenLayout | None:
    """Images of equal size that follow each other in a row, as the frames of one video; a video needs two of them."""
    layout = TokenLayout.empty(*where.shape)
    groups: list[tuple[int, tuple[int, ...], list[Tensor]]] = []
    for (row, places), size in zip(split_rows(where, lengths), sizes, strict=True):
        if groups and groups[-1][:2] == (row, size):
            groups[-1][2].append(places)
        else:
            groups.append((row, size, [places]))
    numbers: dict[int, int] = {}
    for row, _, images in groups:
        if len(images) > 1:
            layout.place(row, torch.cat(images), len(images[0]), numbers.setdefault(row, 0))
            numbers[row] += 1
    return layout if layout.has_vision else None
