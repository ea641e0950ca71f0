"""Noun phrases that pick out objects among others."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from pared_zoo.world.caption import plural
from pared_zoo.world.scene import Object

#: Which attributes a phrase may name, in the order they are spoken.
PHRASES: tuple[tuple[str, ...], ...] = (
    ("shape",),
    ("color",),
    ("color", "shape"),
    ("size", "shape"),
    ("size", "color"),
    ("texture", "shape"),
    ("size", "color", "shape"),
)


def said(obj: Object, attributes: Sequence[str]) -> dict[str, str]:
    """The words of an object for some attributes."""
    return {a: getattr(obj, a) for a in attributes}


def phrase(words: Mapping[str, str], many: bool = False) -> str:
    """Say words by attribute, such as ``"small circle"`` or, for many, ``"red objects"``."""
    adjectives = [word for attribute, word in words.items() if attribute != "shape"]
    shape = words.get("shape", "object")
    return " ".join([*adjectives, plural(shape) if many else shape])


def alike(words: Mapping[str, str], objects: Sequence[Object]) -> list[Object]:
    """Those of ``objects`` that all the words fit."""
    return [o for o in objects if all(getattr(o, attribute) == word for attribute, word in words.items())]


def refer(
    rng: random.Random, obj: Object, others: Sequence[Object], hidden: Sequence[str] = (), group: Sequence[str] = ()
) -> tuple[str, bool] | None:
    """A phrase that only fits ``obj``, or objects that share the attributes ``group`` with it.

    Args:
        rng: picks among the phrases that fit.
        obj: the object meant.
        others: all objects, ``obj`` included.
        hidden: attributes the phrase may not name.
        group: if not empty, several objects may be meant as long as they agree in these attributes.

    Returns:
        (phrase, whether it is plural), or None if no phrase fits.
    """
    fitting = []
    for attributes in PHRASES:
        if not set(attributes) & set(hidden):
            meant = alike(said(obj, attributes), others)
            if len(meant) == 1 or (group and alike(said(obj, group), meant) == meant):
                fitting.append((phrase(said(obj, attributes), many=len(meant) > 1), len(meant) > 1))
    return rng.choice(fitting) if fitting else None
