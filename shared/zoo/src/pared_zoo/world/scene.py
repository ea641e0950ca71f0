"""Scenes: what is in a picture, as data, and how scenes are drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pared_zoo.world.attributes import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    check_word,
)

T = TypeVar("T")

#: Free space between the circles in the boxes of two objects, and between a box and the border (fractions of the side).
GAP = 0.04
MARGIN = 0.02
#: How much further apart two objects must be along the axis of a relation than along the other one.
RELATION_MARGIN = 0.10
#: Uniform jitter of an object's radius around the nominal one of its size.
RADIUS_JITTER = 0.08

KINDS: tuple[str, ...] = ("single", "placed", "pair", "count", "list")


@dataclass(frozen=True)
class Object:
    """One object: its words and its place.

    Attributes:
        shape, color, size, texture: words from ``pared_zoo.world.attributes``.
        x, y: centre as fractions of the image side, x to the right and y downwards.
        radius: half the side of the layout box as a fraction of the image side.

    Raises:
        ValueError: for a word that the world does not have, or a radius that is not positive.
    """

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        check_word("shape", self.shape, SHAPES)
        check_word("color", self.color, COLORS)
        check_word("size", self.size, SIZES)
        check_word("texture", self.texture, TEXTURES)
        if not self.radius > 0:
            raise ValueError(f"radius={self.radius!r} must be positive")

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Layout box (x0, y0, x1, y1) as fractions of the image side."""
        return (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)

    @property
    def words(self) -> tuple[str, str, str, str]:
        """The attributes a caption can name: (shape, color, size, texture)."""
        return (self.shape, self.color, self.size, self.texture)


@dataclass(frozen=True)
class Scene:
    """Objects on a background, and what a caption may say about their arrangement.

    Attributes:
        objects: one to four objects, none in a frame of a clip that shows none; in a "pair" the relation reads
            ``objects[0] relation objects[1]``.
        background: a word of ``BACKGROUNDS``.
        kind: one of ``KINDS``: a single object, one with a named place, a related pair, equal objects to count, or a
            list.
        relation: a word of ``RELATIONS`` for a pair, else None.
        place: a word of ``PLACES`` for a placed object, else None.

    Raises:
        ValueError: for a word that the world does not have, or a pair without a relation or a placed object without a
            place.
    """

    objects: tuple[Object, ...]
    background: str
    kind: str
    relation: str | None = None
    place: str | None = None

    def __post_init__(self) -> None:
        check_word("background", self.background, BACKGROUNDS)
        check_word("kind", self.kind, KINDS)
        if self.kind == "pair" or self.relation is not None:
            check_word("relation", str(self.relation), RELATIONS)
        if self.kind == "placed" or self.place is not None:
            check_word("place", str(self.place), PLACES)

    @property
    def boxes(self) -> tuple[tuple[float, float, float, float], ...]:
        """Layout boxes of the objects, in their order."""
        return tuple(o.box for o in self.objects)


@dataclass(frozen=True)
class SceneDistribution:
    """What scenes are drawn from.

    Attributes:
        kinds: relative weights of ``KINDS``.
        max_objects: 1 to 4; kinds that need more objects than allowed are not drawn.
        texture_weights: relative weights of ``TEXTURES``.
    """

    kinds: tuple[float, ...] = (0.2, 0.2, 0.35, 0.15, 0.1)
    max_objects: int = 4
    texture_weights: tuple[float, ...] = (0.6, 0.2, 0.2)

    def __post_init__(self) -> None:
        if not 1 <= self.max_objects <= 4:
            raise ValueError(f"max_objects={self.max_objects!r} must be 1 to 4")
        if len(self.kinds) != len(KINDS) or min(self.kinds) < 0 or sum(self.kinds) <= 0:
            raise ValueError(f"kinds={self.kinds!r} must be {len(KINDS)} weights >= 0 with a positive sum, for {KINDS}")
        if self.possible.sum() <= 0:
            raise ValueError(f"kinds={self.kinds!r} has no kind that max_objects={self.max_objects} allows")
        if (
            len(self.texture_weights) != len(TEXTURES)
            or min(self.texture_weights) < 0
            or sum(self.texture_weights) <= 0
        ):
            raise ValueError(
                f"texture_weights={self.texture_weights!r} must be {len(TEXTURES)} weights >= 0 with a positive sum"
            )

    @property
    def possible(self) -> np.ndarray:
        """Weights of ``KINDS``, float64 (5,), with 0 where ``max_objects`` does not allow the kind."""
        fewest = np.array([1, 1, 2, 2, 3])
        return np.where(fewest <= self.max_objects, np.asarray(self.kinds, dtype=np.float64), 0.0)


def sample_scenes(n: int, seed: int, distribution: SceneDistribution | None = None) -> list[Scene]:
    """Draw ``n`` scenes; the same ``seed`` gives the same scenes in every process.

    Raises:
        ValueError: if ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"n={n!r} must be >= 0")
    stream = iter_scenes(seed, distribution)
    return [next(stream) for _ in range(n)]


def iter_scenes(seed: int, distribution: SceneDistribution | None = None) -> Iterator[Scene]:
    """The endless stream whose first ``n`` elements ``sample_scenes(n, seed)`` returns."""
    distribution = distribution or SceneDistribution()
    rng = np.random.default_rng(seed)
    kinds = distribution.possible
    kind_edges = np.cumsum(kinds / kinds.sum())
    textures = np.asarray(distribution.texture_weights, dtype=np.float64)
    texture_edges = np.cumsum(textures / textures.sum())
    while True:
        yield _sample_one(rng, kind_edges, texture_edges, distribution.max_objects)


def _sample_one(rng: np.random.Generator, kind_edges: np.ndarray, texture_edges: np.ndarray, max_objects: int) -> Scene:
    kind = KINDS[int(np.searchsorted(kind_edges, rng.random(), side="right"))]
    background = choose(rng, tuple(BACKGROUNDS))
    if kind in ("single", "placed"):
        words = [sample_words(rng, texture_edges)]
    elif kind == "pair":
        words = _distinct(rng, texture_edges, 2)
    elif kind == "count":
        words = [sample_words(rng, texture_edges)] * int(rng.integers(2, max_objects + 1))
    else:
        words = _distinct(rng, texture_edges, int(rng.integers(3, max_objects + 1)))
    if len(words) > 2:
        # Four large objects do not fit side by side; crowded scenes are scenes of small things.
        words = [(shape, color, "small", texture) for shape, color, _, texture in words]
    relation = choose(rng, RELATIONS) if kind == "pair" else None
    place = choose(rng, tuple(PLACES)) if kind == "placed" else None
    while True:
        radii = [SIZES[w[2]] * (1 + RADIUS_JITTER * (2 * rng.random() - 1)) for w in words]
        centres = _place(rng, radii, relation, place)
        if centres is not None:
            break
    objects = tuple(
        Object(shape, color, size, texture, x, y, radius)
        for (shape, color, size, texture), (x, y), radius in zip(words, centres, radii, strict=True)
    )
    return Scene(objects, background, kind, relation, place)


def _place(
    rng: np.random.Generator, radii: list[float], relation: str | None, place: str | None, attempts: int = 64
) -> list[tuple[float, float]] | None:
    """Centres without overlap that satisfy the relation or place, or None when the attempts run out."""
    r = np.asarray(radii)
    low, span = r + MARGIN, 1 - 2 * (r + MARGIN)
    candidates = low[None, :, None] + span[None, :, None] * rng.random((attempts, len(radii), 2))
    if place is not None:
        centre = np.asarray(PLACES[place]) + 0.06 * (2 * rng.random(2) - 1)
        centre = np.clip(centre, low[0], 1 - low[0])
        return [(float(centre[0]), float(centre[1]))]
    ok = np.ones(attempts, dtype=bool)
    for i in range(len(radii)):
        for j in range(i):
            distance = np.hypot(*(candidates[:, i] - candidates[:, j]).T)
            ok &= distance >= r[i] + r[j] + GAP
    if relation is not None:
        ok &= holds(relation, candidates[:, 0], candidates[:, 1])
    hits = np.flatnonzero(ok)
    if hits.size == 0:
        return None
    return [(float(x), float(y)) for x, y in candidates[hits[0]]]


def holds(relation: str, first: np.ndarray, second: np.ndarray, margin: float = RELATION_MARGIN) -> np.ndarray:
    """Whether ``first relation second`` is true, for centres of shape (..., 2) as (x, y) with y downwards."""
    dx, dy = second[..., 0] - first[..., 0], second[..., 1] - first[..., 1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along >= np.abs(across) + margin


def sample_words(rng: np.random.Generator, texture_edges: np.ndarray) -> tuple[str, str, str, str]:
    """Draw (shape, color, size, texture); ``texture_edges`` are the cumulated weights of ``TEXTURES``."""
    texture = TEXTURES[int(np.searchsorted(texture_edges, rng.random(), side="right"))]
    return (choose(rng, SHAPES), choose(rng, tuple(COLORS)), choose(rng, tuple(SIZES)), texture)


def _distinct(rng: np.random.Generator, texture_edges: np.ndarray, n: int) -> list[tuple[str, str, str, str]]:
    """Words of ``n`` objects of which no two share both shape and colour, so that a caption can tell them apart."""
    words: list[tuple[str, str, str, str]] = []
    while len(words) < n:
        candidate = sample_words(rng, texture_edges)
        if all(candidate[:2] != w[:2] for w in words):
            words.append(candidate)
    return words


def choose(rng: np.random.Generator, options: tuple[T, ...]) -> T:
    """Draw one of ``options``, all equally likely."""
    return options[int(rng.integers(len(options)))]
