"""Motion programs: when an object moves, which way and how fast, and when it shows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pared_zoo.world.attributes import COLORS, check_word
from pared_zoo.world.scene import choose

#: Unit steps (x, y) with y downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

#: Speeds behind the words, in picture sides per clip length; nothing moves at a speed between the two ranges.
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (0.12, 0.25), "quickly": (0.45, 0.58)}


@dataclass(frozen=True)
class Move:
    """Steady motion between two frames.

    Attributes:
        start, stop: the object leaves its place after frame ``start`` and reaches its new one at frame ``stop``.
        direction: a word of ``DIRECTIONS``.
        step: distance from one frame to the next, as a fraction of the picture side.

    Raises:
        ValueError: for an unknown direction, or frames that are not 0 <= start < stop.
    """

    start: int
    stop: int
    direction: str
    step: float

    def __post_init__(self) -> None:
        check_word("direction", self.direction, DIRECTIONS)
        if not 0 <= self.start < self.stop:
            raise ValueError(f"start={self.start!r} and stop={self.stop!r} must be frames with 0 <= start < stop")

    @property
    def distance(self) -> float:
        """Length of the way, as a fraction of the picture side."""
        return (self.stop - self.start) * self.step


@dataclass(frozen=True)
class Program:
    """What one object does in a clip; outside its moves it stands still.

    Attributes:
        moves: in order, not overlapping.
        bounces: turned back at the border instead of staying clear of it.
        appears: first frame in which the object shows.
        vanishes: first frame in which it no longer shows, or None.
        recolor: (frame, colour) from which on it has another colour, or None.

    Raises:
        ValueError: if moves overlap or are out of order, or for a colour that the world does not have.
    """

    moves: tuple[Move, ...] = ()
    bounces: bool = False
    appears: int = 0
    vanishes: int | None = None
    recolor: tuple[int, str] | None = None

    def __post_init__(self) -> None:
        if any(after.start < before.stop for before, after in pairwise(self.moves)):
            raise ValueError(f"moves={self.moves!r} must be in order and not overlap")
        if self.recolor is not None:
            check_word("recolor", self.recolor[1], COLORS)

    def offsets(self, frames: int) -> np.ndarray:
        """Way from the first place, (frames, 2) as (x, y) fractions of the side, before any bounce."""
        steps = np.zeros((frames, 2))
        for move in self.moves:
            steps[move.start + 1 : move.stop + 1] = np.multiply(DIRECTIONS[move.direction], move.step)
        return np.cumsum(steps, axis=0)

    def visible(self, frames: int) -> np.ndarray:
        """Whether the object shows, (frames,) bool."""
        at = np.arange(frames)
        return (at >= self.appears) & (at < (frames if self.vanishes is None else self.vanishes))


def fold(position: np.ndarray, low: float, high: float) -> np.ndarray:
    """Positions of something that is reflected whenever it reaches ``low`` or ``high``."""
    phase = np.mod(position - low, 2 * (high - low))
    return low + np.minimum(phase, 2 * (high - low) - phase)


def sample_program(rng: np.random.Generator, kind: str, frames: int) -> Program:
    """Draw the program of the subject of a clip of ``kind``, one of ``SUBJECTS``."""
    return SUBJECTS[kind](rng, frames - 1)


def move(rng: np.random.Generator, start: int, stop: int, speed: str, last: int, direction: str | None = None) -> Move:
    """A move of ``speed`` from frame ``start`` to ``stop`` of a clip whose last frame is ``last``.

    A quick move that lasts a part of the clip still covers the whole way, so its speed is that much higher.
    """
    low, high = SPEEDS[speed]
    distance = low + (high - low) * rng.random()
    if speed == "slowly":
        distance *= (stop - start) / last
    return Move(start, stop, direction or choose(rng, tuple(DIRECTIONS)), distance / (stop - start))


def _between(rng: np.random.Generator, low: float, high: float, last: int) -> int:
    """A frame between two fractions of the clip, both at least one frame away from its ends."""
    return int(np.clip(round(last * (low + (high - low) * rng.random())), 1, last - 1))


def _still(rng: np.random.Generator, last: int) -> Program:
    return Program()


def _slow(rng: np.random.Generator, last: int) -> Program:
    return Program((move(rng, 0, last, "slowly", last),))


def _fast(rng: np.random.Generator, last: int) -> Program:
    return Program((move(rng, 0, last, "quickly", last),))


def _still_then_fast(rng: np.random.Generator, last: int) -> Program:
    return Program((move(rng, _between(rng, 0.5, 0.7, last), last, "quickly", last),))


def _fast_then_still(rng: np.random.Generator, last: int) -> Program:
    return Program((move(rng, 0, _between(rng, 0.3, 0.5, last), "quickly", last),))


def _burst(rng: np.random.Generator, last: int) -> Program:
    start = _between(rng, 0.25, 0.5, last)
    return Program((move(rng, start, min(start + max(1, round(0.25 * last)), last - 1), "quickly", last),))


def _turn(rng: np.random.Generator, last: int) -> Program:
    middle = _between(rng, 0.4, 0.6, last)
    first = move(rng, 0, middle, "quickly", last)
    across = ("up", "down") if first.direction in ("left", "right") else ("left", "right")
    return Program((first, move(rng, middle, last, "quickly", last, choose(rng, across))))


def _bounce(rng: np.random.Generator, last: int) -> Program:
    # At least twice the free way, so that the object is turned back no matter where it starts.
    return Program((Move(0, last, choose(rng, tuple(DIRECTIONS)), (1.6 + 0.8 * rng.random()) / last),), bounces=True)


def _appear(rng: np.random.Generator, last: int) -> Program:
    return Program(appears=_between(rng, 0.25, 0.75, last))


def _vanish(rng: np.random.Generator, last: int) -> Program:
    return Program(vanishes=_between(rng, 0.25, 0.75, last))


def _flash(rng: np.random.Generator, last: int) -> Program:
    at = _between(rng, 0.0, 1.0, last)
    return Program(appears=at, vanishes=at + 1)


#: How to draw what the first object of a clip of each kind does, from a generator and the last frame.
SUBJECTS = {
    "still": _still,
    "slow": _slow,
    "fast": _fast,
    "still_then_fast": _still_then_fast,
    "fast_then_still": _fast_then_still,
    "burst": _burst,
    "turn": _turn,
    "bounce": _bounce,
    "appear": _appear,
    "vanish": _vanish,
    "flash": _flash,
}
