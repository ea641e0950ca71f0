"""Clips: objects that follow motion programs, as data, and how clips are drawn at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

import numpy as np

from pared_zoo.world.attributes import BACKGROUNDS, COLORS, RELATIONS, SIZES, TEXTURES, check_word
from pared_zoo.world.motion import SUBJECTS, Program, fold, move, sample_program
from pared_zoo.world.render import render
from pared_zoo.world.scene import GAP, MARGIN, RADIUS_JITTER, Object, Scene, choose, holds, sample_words

CLIP_KINDS: tuple[str, ...] = (*SUBJECTS, "recolor", "order", "count", "pair")
#: A program needs room for a still span, a motion and another still span.
MIN_FRAMES = 8


@dataclass(frozen=True)
class Clip:
    """Objects on a background and what each does, frame by frame; time is counted in frames.

    Attributes:
        objects: one to four objects as they stand at frame 0; the first is the one the clip is about.
        programs: what each object does.
        background: a word of ``BACKGROUNDS``.
        kind: one of ``CLIP_KINDS``.
        frames: number of frames.
        relation: a word of ``RELATIONS`` that ``objects[0] relation objects[1]`` keep in every frame of a "pair", else
            None.

    Raises:
        ValueError: for a word that the world does not have, no objects, another number of programs than of objects, or
            less than one frame.
    """

    objects: tuple[Object, ...]
    programs: tuple[Program, ...]
    background: str
    kind: str
    frames: int
    relation: str | None = None

    def __post_init__(self) -> None:
        check_word("background", self.background, BACKGROUNDS)
        check_word("kind", self.kind, CLIP_KINDS)
        if self.kind == "pair" or self.relation is not None:
            check_word("relation", str(self.relation), RELATIONS)
        if not self.objects or len(self.objects) != len(self.programs):
            raise ValueError(
                f"objects and programs must be equally many and at least one, not {len(self.objects)} and "
                f"{len(self.programs)}"
            )
        if self.frames < 1:
            raise ValueError(f"frames={self.frames!r} must be 1 or more")

    @property
    def centres(self) -> np.ndarray:
        """Centres (frames, objects, 2) as (x, y) fractions of the side, also while an object does not show."""
        tracks = [_track(o, p, self.frames) for o, p in zip(self.objects, self.programs, strict=True)]
        return np.stack(tracks, axis=1)

    @property
    def visible(self) -> np.ndarray:
        """Which objects show, (frames, objects) bool."""
        return np.stack([p.visible(self.frames) for p in self.programs], axis=1)

    @property
    def boxes(self) -> np.ndarray:
        """Layout boxes (frames, objects, 4) as (x0, y0, x1, y1) fractions of the side, to be read with ``visible``."""
        radius = np.array([o.radius for o in self.objects])[None, :, None]
        return np.concatenate([self.centres - radius, self.centres + radius], axis=-1)

    @property
    def speed(self) -> np.ndarray:
        """Distance of each visible object from its place a frame before, (frames, objects); 0 at frame 0."""
        centres, visible = self.centres, self.visible
        moved = np.zeros((self.frames, len(self.objects)))
        moved[1:] = np.linalg.norm(np.diff(centres, axis=0), axis=-1) * (visible[1:] & visible[:-1])
        return moved

    @property
    def changed(self) -> np.ndarray:
        """Whether a frame differs from the one before it, (frames,) bool; False at frame 0."""
        visible = self.visible
        different = np.zeros(visible.shape, dtype=bool)
        different[1:] = (np.diff(self.centres, axis=0) != 0).any(axis=-1) & visible[1:]
        different[1:] |= visible[1:] != visible[:-1]
        for k, program in enumerate(self.programs):
            if program.recolor is not None and program.recolor[1] != self.objects[k].color:
                at = program.recolor[0]
                if 0 < at < self.frames:
                    different[at, k] |= visible[at, k]
        return np.asarray(different.any(axis=1))

    @property
    def still_spans(self) -> tuple[tuple[int, int], ...]:
        """Longest runs of equal frames as (first, one past the last), of two frames or more."""
        edges = [0, *np.flatnonzero(self.changed).tolist(), self.frames]
        return tuple((a, b) for a, b in pairwise(edges) if b - a >= 2)

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """What each frame shows."""
        return self._scenes(range(self.frames))

    def _scenes(self, frames: Iterable[int]) -> tuple[Scene, ...]:
        centres, visible = self.centres.tolist(), self.visible.tolist()
        scenes = []
        for f in frames:
            shown = []
            for k, (o, program) in enumerate(zip(self.objects, self.programs, strict=True)):
                if visible[f][k]:
                    recolored = program.recolor is not None and f >= program.recolor[0]
                    color = program.recolor[1] if program.recolor is not None and recolored else o.color
                    x, y = centres[f][k]
                    shown.append(Object(o.shape, color, o.size, o.texture, x, y, o.radius))
            scenes.append(Scene(tuple(shown), self.background, "list"))
        return tuple(scenes)


@dataclass(frozen=True)
class ClipDistribution:
    """What clips are drawn from.

    Attributes:
        kinds: relative weights of ``CLIP_KINDS``; a kind that is not named is not drawn.
        max_objects: 1 to 4; clips that need more objects than allowed are not drawn.
        texture_weights: relative weights of ``TEXTURES``.
    """

    kinds: Mapping[str, float] = field(default_factory=lambda: MappingProxyType(dict.fromkeys(CLIP_KINDS, 1.0)))
    max_objects: int = 3
    texture_weights: tuple[float, ...] = (0.6, 0.2, 0.2)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(CLIP_KINDS))
        if unknown:
            raise ValueError(f"kinds has {unknown[0]!r}; valid are {', '.join(CLIP_KINDS)}")
        if not 1 <= self.max_objects <= 4:
            raise ValueError(f"max_objects={self.max_objects!r} must be 1 to 4")
        if any(weight < 0 for weight in self.kinds.values()) or not self.possible:
            raise ValueError(f"kinds={dict(self.kinds)!r} must have weights >= 0, one of a possible kind positive")
        weights = self.texture_weights
        if len(weights) != len(TEXTURES) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"texture_weights={weights!r} must be {len(TEXTURES)} weights >= 0 with a positive sum")

    @property
    def possible(self) -> dict[str, float]:
        """Positive weights of the kinds that ``max_objects`` allows."""
        too_many = ("order", "count", "pair") if self.max_objects == 1 else ()
        return {k: float(self.kinds[k]) for k in CLIP_KINDS if self.kinds.get(k, 0) > 0 and k not in too_many}


def sample_clips(n: int, seed: int, frames: int = 16, distribution: ClipDistribution | None = None) -> list[Clip]:
    """Draw ``n`` clips of ``frames`` frames; the same arguments give the same clips in every process.

    Raises:
        ValueError: if ``n`` is negative or ``frames`` less than 8.
    """
    if n < 0:
        raise ValueError(f"n={n!r} must be >= 0")
    stream = iter_clips(seed, frames, distribution)
    return [next(stream) for _ in range(n)]


def iter_clips(seed: int, frames: int = 16, distribution: ClipDistribution | None = None) -> Iterator[Clip]:
    """The endless stream whose first ``n`` elements ``sample_clips(n, seed, ...)`` returns.

    Raises:
        ValueError: if ``frames`` is less than 8.
    """
    if frames < MIN_FRAMES:
        raise ValueError(f"frames={frames!r} must be {MIN_FRAMES} or more")
    return _stream(np.random.default_rng(seed), frames, distribution or ClipDistribution())


def render_clip(clip: Clip, size: int = 64) -> np.ndarray:
    """Draw a clip.

    Args:
        clip: the clip.
        size: side of the square frames in pixels, 16 to 1024.

    Returns:
        uint8 array (frames, size, size, 3), RGB; frames of a still span are equal to the last bit.
    """
    return render_clips([clip], size)[0]


def render_clips(clips: Sequence[Clip], size: int = 64) -> np.ndarray:
    """Draw clips of equal length at once, as uint8 (clips, frames, size, size, 3).

    Raises:
        ValueError: if the clips differ in length or ``size`` is out of range.
    """
    lengths = sorted({c.frames for c in clips})
    if len(lengths) > 1:
        raise ValueError(f"clips of {lengths} frames cannot be drawn into one array")
    scenes: list[Scene] = []
    index: list[np.ndarray] = []
    for clip in clips:
        # Equal neighbours are drawn once.
        new = clip.changed
        new[0] = True
        index.append(len(scenes) - 1 + np.cumsum(new))
        scenes += clip._scenes(np.flatnonzero(new).tolist())
    pictures = render(scenes, size)
    frames = lengths[0] if lengths else 0
    return pictures[np.concatenate(index)].reshape(len(clips), frames, size, size, 3) if clips else pictures[:, None]


def _track(obj: Object, program: Program, frames: int) -> np.ndarray:
    position = np.array([obj.x, obj.y]) + program.offsets(frames)
    return fold(position, obj.radius + MARGIN, 1 - obj.radius - MARGIN) if program.bounces else position


def _stream(rng: np.random.Generator, frames: int, distribution: ClipDistribution) -> Iterator[Clip]:
    weights = distribution.possible
    kinds, edges = tuple(weights), np.cumsum(list(weights.values())) / sum(weights.values())
    textures = np.cumsum(distribution.texture_weights) / sum(distribution.texture_weights)
    while True:
        kind = kinds[int(np.searchsorted(edges, rng.random(), side="right"))]
        background = choose(rng, tuple(BACKGROUNDS))
        words = _cast(rng, kind, textures, distribution.max_objects)
        relation = choose(rng, RELATIONS) if kind == "pair" else None
        while True:
            programs = _direct(rng, kind, words, frames)
            objects = _place(rng, words, programs, frames, relation)
            if objects is not None:
                break
        yield Clip(objects, programs, background, kind, frames, relation)


def _cast(
    rng: np.random.Generator, kind: str, textures: np.ndarray, max_objects: int
) -> list[tuple[str, str, str, str]]:
    """Words of the objects of a clip: equal ones for a count, else no two with the same shape or the same colour."""
    if kind == "count":
        n = int(rng.integers(2, max_objects + 1))
        shape, color, size, texture = sample_words(rng, textures)
        return [(shape, color, "small", texture)] * n if n > 2 else [(shape, color, size, texture)] * n
    fewest = 2 if kind in ("order", "pair") else 1
    n = 2 if kind == "pair" else int(rng.integers(fewest, min(max_objects, 3) + 1))
    words: list[tuple[str, str, str, str]] = []
    while len(words) < n:
        candidate = sample_words(rng, textures)
        if all(candidate[0] != w[0] and candidate[1] != w[1] for w in words):
            words.append(candidate)
    if n > 2:
        words = [(shape, color, "small", texture) for shape, color, _, texture in words]
    return words


def _direct(
    rng: np.random.Generator, kind: str, words: list[tuple[str, str, str, str]], frames: int
) -> tuple[Program, ...]:
    last, still = frames - 1, Program()
    if kind == "order":
        middle = round(last * (0.4 + 0.2 * rng.random()))
        first = Program((move(rng, 0, middle, "quickly", last),))
        return (first, Program((move(rng, middle, last, "quickly", last),)), *[still] * (len(words) - 2))
    if kind in ("count", "pair"):
        return (sample_program(rng, choose(rng, ("still", "slow", "fast")), frames),) * len(words)
    if kind == "recolor":
        others = tuple(c for c in COLORS if all(c != w[1] for w in words))
        at = round(last * (0.25 + 0.5 * rng.random()))
        subject = Program(recolor=(at, choose(rng, others)))
    else:
        subject = sample_program(rng, kind, frames)
    return (subject, *[still] * (len(words) - 1))


def _place(
    rng: np.random.Generator,
    words: list[tuple[str, str, str, str]],
    programs: tuple[Program, ...],
    frames: int,
    relation: str | None,
    attempts: int = 32,
) -> tuple[Object, ...] | None:
    """Starting places from which the programs stay inside the picture and never touch, or None."""
    radii = [SIZES[w[2]] * (1 + RADIUS_JITTER * (2 * rng.random() - 1)) for w in words]
    starts, tracks = [], []
    for radius, program in zip(radii, programs, strict=True):
        offsets = program.offsets(frames)
        low, high = np.full(2, radius + MARGIN), np.full(2, 1 - radius - MARGIN)
        if not program.bounces:
            low, high = low - offsets.min(axis=0), high - offsets.max(axis=0)
        if (high < low).any():
            return None
        start = low + (high - low) * rng.random((attempts, 2))
        track = start[:, None] + offsets
        starts.append(start)
        tracks.append(fold(track, radius + MARGIN, 1 - radius - MARGIN) if program.bounces else track)
    apart = np.ones(attempts, dtype=bool)
    for i in range(len(radii)):
        for j in range(i):
            distance = np.linalg.norm(tracks[i] - tracks[j], axis=-1).min(axis=1)
            apart &= distance >= radii[i] + radii[j] + GAP
    if relation is not None:
        apart &= holds(relation, starts[0], starts[1])
    hits = np.flatnonzero(apart)
    if hits.size == 0:
        return None
    places = [s[hits[0]].tolist() for s in starts]
    return tuple(
        Object(shape, color, size, texture, x, y, radius)
        for (shape, color, size, texture), (x, y), radius in zip(words, places, radii, strict=True)
    )
