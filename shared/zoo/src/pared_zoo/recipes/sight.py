"""What a vision-language model can be asked about every place of every frame while it learns to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy, smooth_l1_loss

from pared_zoo.world import Clip
from pared_zoo.world.attributes import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES
from pared_zoo.world.motion import DIRECTIONS, SPEEDS

#: A frame's tokens form a square grid of this side; an object belongs to the cell that its centre is in.
GRID = 4
#: What one frame shows in a cell, and how many answers there are.
LOOKS: dict[str, int] = {
    "object": 2,
    "background": len(BACKGROUNDS),
    "shape": len(SHAPES),
    "color": len(COLORS),
    "size": len(SIZES),
    "texture": len(TEXTURES),
}
#: Where an object's centre is: x and y in cells from the middle of the frame. Counted anew in every cell, they would
#: jump where a moving object goes from one cell to the next.
PLACE = 2
#: What frames up to this one tell of the object in a cell: which way it goes now (or not at all), how fast, whether it
#: was there from the first frame on, which colour it had before (or none).
MOTIONS: dict[str, int] = {"way": 1 + len(DIRECTIONS), "pace": 1 + len(SPEEDS), "entered": 2, "was": 1 + len(COLORS)}
#: And in numbers: the way (x, y) from where it was first seen, in cells; the step (x, y) from the frame before, in
#: sides of the frame per clip; the time from 0 to 1.
PATH = 5
#: Way within the whole clip above which a speed is called quick; nothing moves at a speed near it.
_QUICK = 0.35
NOTHING = -100


def look_words() -> list[str]:
    """Words of all answers to ``LOOKS`` but the first, in their order, each as it stands within a text."""
    return [f" {word}" for words in (BACKGROUNDS, SHAPES, COLORS, SIZES, TEXTURES) for word in words]


@dataclass(frozen=True)
class Cells:
    """Right answers for every cell of clips of equal length; ``NOTHING`` stands where there is no object.

    Attributes:
        looks: int64 (clips, frames, GRID * GRID, len(LOOKS)).
        places: float32 (clips, frames, GRID * GRID, PLACE).
        motions: int64 (clips, frames, GRID * GRID, len(MOTIONS)).
        paths: float32 (clips, frames, GRID * GRID, PATH).
    """

    looks: torch.Tensor
    places: torch.Tensor
    motions: torch.Tensor
    paths: torch.Tensor


def cells(clips: Sequence[Clip]) -> Cells:
    """What every cell of every frame shows and how it came there."""
    shape = (len(clips), clips[0].frames, GRID * GRID)
    looks = np.full((*shape, len(LOOKS)), NOTHING)
    motions = np.full((*shape, len(MOTIONS)), NOTHING)
    places, paths = (np.zeros((*shape, n), dtype=np.float32) for n in (PLACE, PATH))
    looks[..., 0] = 0
    for i, clip in enumerate(clips):
        looks[i, ..., 1] = list(BACKGROUNDS).index(clip.background)
        centres, visible = clip.centres, clip.visible
        for k in reversed(range(len(clip.objects))):
            frames = np.flatnonzero(visible[:, k])
            at = np.clip(centres[frames, k] * GRID, 0, GRID - 1e-6)
            cell = at.astype(int) @ (1, GRID)
            o = clip.objects[k]
            words = (SHAPES.index(o.shape), list(SIZES).index(o.size), TEXTURES.index(o.texture))
            looks[i, frames, cell, 0] = 1
            looks[i, frames, cell, 2] = words[0]
            looks[i, frames, cell, 3] = _colors(clip, k)[frames]
            looks[i, frames, cell, 4:] = words[1:]
            places[i, frames, cell] = at - GRID / 2
            motions[i, frames, cell] = _told(clip, k, centres[:, k], visible[:, k])[frames]
            paths[i, frames, cell] = _path(centres[:, k], int(frames[0]))[frames]
    return Cells(*(torch.from_numpy(values) for values in (looks, places, motions, paths)))


def _colors(clip: Clip, k: int) -> np.ndarray:
    names, recolor = list(COLORS), clip.programs[k].recolor
    color = np.full(clip.frames, names.index(clip.objects[k].color))
    if recolor is not None:
        color[recolor[0] :] = names.index(recolor[1])
    return color


def _told(clip: Clip, k: int, track: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Answers to ``MOTIONS``, (frames, len(MOTIONS)); of the first frame nothing is asked."""
    step = np.diff(track, axis=0, prepend=track[:1])
    length = np.abs(step).max(axis=1)
    moving = length > 1e-9
    sideways = np.abs(step[:, 0]) > np.abs(step[:, 1])
    # 1 left, 2 right, 3 up, 4 down: the order of DIRECTIONS.
    way = np.where(sideways, 1 + (step[:, 0] > 0), 3 + (step[:, 1] > 0)) * moving
    pace = moving * np.where(length * (clip.frames - 1) < _QUICK, 1, 2)
    entered = np.full(clip.frames, not visible[0])
    original = 1 + list(COLORS).index(clip.objects[k].color)
    was = np.where(_colors(clip, k) == original - 1, 0, original)
    told = np.stack([way, pace, entered, was], axis=1).astype(int)
    told[0] = NOTHING
    return told


def _path(track: np.ndarray, first: int) -> np.ndarray:
    """Numbers for ``PATH``, (frames, PATH)."""
    frames = len(track)
    step = np.diff(track, axis=0, prepend=track[:1]) * (frames - 1)
    time = np.arange(frames)[:, None] / max(1, frames - 1)
    return np.concatenate([GRID * (track - track[first]), step, time], axis=1)


def look_loss(guesses: torch.Tensor, looks: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of ``(..., sum(LOOKS) + PLACE)`` guesses, and the share of right attributes of objects."""
    *words, point = guesses.float().flatten(0, -2).split([*LOOKS.values(), PLACE], dim=-1)
    wanted, there = looks.flatten(0, -2), (looks[..., 0] == 1).flatten()
    terms = [_entropy(guess, wanted[:, k]) for k, guess in enumerate(words)]
    terms.append(smooth_l1_loss(point[there], places.flatten(0, -2)[there], beta=0.2))
    right = torch.stack([guess[there].argmax(-1) == wanted[there, k] for k, guess in enumerate(words) if k > 1])
    return torch.stack(terms).sum(), right.float().mean()


def motion_loss(guesses: torch.Tensor, motions: torch.Tensor, paths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of ``(..., sum(MOTIONS) + PATH)`` guesses, and the share of moving objects whose way is told right."""
    *told, path = guesses.float().flatten(0, -2).split([*MOTIONS.values(), PATH], dim=-1)
    wanted = motions.flatten(0, -2)
    terms = [_entropy(guess, wanted[:, k]) for k, guess in enumerate(told)]
    seen, moving = wanted[:, 0] != NOTHING, wanted[:, 0] > 0
    distance = smooth_l1_loss(path[seen], paths.flatten(0, -2)[seen], beta=0.2, reduction="sum")
    terms.append(distance / seen.sum().clamp(min=1))
    right = (told[0][moving].argmax(-1) == wanted[moving, 0]).float()
    return torch.stack(terms).sum(), right.sum() / moving.sum().clamp(min=1)


def _entropy(guess: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    count = (wanted != NOTHING).sum().clamp(min=1)
    return cross_entropy(guess, wanted, ignore_index=NOTHING, reduction="sum") / count
