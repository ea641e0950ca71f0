"""Captions by grammar, with paraphrases that mean the same scene."""

from __future__ import annotations

import random
from typing import TypeVar

from pared_zoo.world.attributes import COUNT_WORDS
from pared_zoo.world.scene import Object, Scene

T = TypeVar("T")

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def caption(scene: Scene, seed: int | None = None) -> str:
    """Say what is in a scene.

    Args:
        scene: the scene.
        seed: picks among the paraphrases; None gives the canonical wording.

    Returns:
        One lower-case sentence without a full stop, such as
        ``"a large red circle left of a small blue square on a gray background"``.
    """
    rng = None if seed is None else random.Random(seed)
    subject = _subject(scene, rng)
    opening = pick(rng, ("", "", "there is ", "a picture of "))
    if opening == "there is " and scene.kind == "count":
        opening = "there are "
    background = pick(rng, (f" on a {scene.background} background", f" in front of {scene.background}"))
    return f"{opening}{subject}{background}"


def _subject(scene: Scene, rng: random.Random | None) -> str:
    if not scene.objects:
        return "nothing"
    first = scene.objects[0]
    if scene.kind == "single":
        return noun(first, rng)
    if scene.kind == "placed":
        return f"{noun(first, rng)} {scene.place}"
    if scene.kind == "pair":
        assert scene.relation is not None
        pair, relation = scene.objects, scene.relation
        if pick(rng, (False, True)):
            pair, relation = pair[::-1], INVERSE[relation]
        to_the = relation in ("left of", "right of") and pick(rng, (False, True))
        return f"{noun(pair[0], rng)} {'to the ' if to_the else ''}{relation} {noun(pair[1], rng)}"
    if scene.kind == "count":
        return f"{COUNT_WORDS[len(scene.objects)]} {adjectives(first)} {plural(first.shape)}"
    return listed([noun(o, rng) for o in scene.objects])


def noun(obj: Object, rng: random.Random | None = None) -> str:
    """Noun phrase for one object, such as ``"a small striped green ring"``."""
    if pick(rng, (False, False, False, True)):
        texture = "" if obj.texture == "plain" else f"{obj.texture} "
        return f"a {texture}{obj.color} {obj.shape} that is {obj.size}".replace("a orange", "an orange")
    return f"a {adjectives(obj)} {obj.shape}"


def listed(nouns: list[str]) -> str:
    """One or more nouns in a row, such as ``"a, b and c"``."""
    return nouns[0] if len(nouns) == 1 else ", ".join(nouns[:-1]) + " and " + nouns[-1]


def plural(shape: str) -> str:
    """More than one of a shape."""
    return "crosses" if shape == "cross" else shape + "s"


def adjectives(obj: Object) -> str:
    """Size, texture unless plain, and colour of an object, such as ``"small striped green"``."""
    texture = "" if obj.texture == "plain" else f"{obj.texture} "
    return f"{obj.size} {texture}{obj.color}"


def pick(rng: random.Random | None, options: tuple[T, ...]) -> T:
    """One of ``options`` at random, or the first without a generator."""
    return options[0] if rng is None else options[rng.randrange(len(options))]
