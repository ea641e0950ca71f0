"""The vocabulary of the world: what an object can look like, and the numbers behind each word."""

from __future__ import annotations

from collections.abc import Collection

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "ring")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "green": (44, 172, 62),
    "blue": (52, 92, 235),
    "yellow": (242, 216, 48),
    "purple": (164, 62, 204),
    "orange": (248, 140, 28),
    "cyan": (64, 212, 222),
    "white": (244, 244, 244),
}

#: Half the side of an object's box, which is the radius of a circle, as a fraction of the image side.
SIZES: dict[str, float] = {"small": 0.11, "large": 0.19}

TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted")

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (18, 18, 22),
    "gray": (112, 112, 118),
    "navy": (22, 30, 84),
    "brown": (92, 58, 36),
}

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")

#: Words for where a single object stands, with the centre each one means, as (x, y) fractions of the side.
PLACES: dict[str, tuple[float, float]] = {
    "in the center": (0.5, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
}

#: Brightness of the dark half of a texture relative to the object's colour.
TEXTURE_SHADE = 0.35

COUNT_WORDS: tuple[str, ...] = ("zero", "one", "two", "three", "four")


def check_word(name: str, word: str, valid: Collection[str]) -> None:
    """Refuse a word that the world does not have.

    Raises:
        ValueError: if ``word`` is none of ``valid``; the message has ``name``, the word and what is valid.
    """
    if word not in valid:
        raise ValueError(f"{name}={word!r} must be one of {', '.join(valid)}")
