"""Questions about scenes and clips with answers that are right by construction."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from pared_zoo.world.attributes import BACKGROUNDS, COLORS, COUNT_WORDS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES
from pared_zoo.world.caption import INVERSE
from pared_zoo.world.clip import Clip
from pared_zoo.world.reference import PHRASES, alike, phrase, refer, said
from pared_zoo.world.scene import Object, Scene, holds

YES_NO: tuple[str, ...] = ("yes", "no")

#: Share of questions kept where the world has one answer more often than the others.
KEPT: dict[str, float] = {"plain": 1 / 3, "small": 0.6, "one": 0.6}


@dataclass(frozen=True)
class Question:
    """A question in lower case and its answer.

    Attributes:
        text: the question, with a question mark.
        answer: one of ``choices``.
        kind: what is asked for; see ``SCENE_QUESTIONS`` and ``CLIP_QUESTIONS``.
        choices: every answer a question of this kind can have.
    """

    text: str
    answer: str
    kind: str
    choices: tuple[str, ...]


Makers = Mapping[str, Callable[[random.Random, Any], Question | None]]


def questions(subject: Scene | Clip, seed: int, n: int, kinds: Sequence[str] | None = None) -> list[Question]:
    """Ask about a scene or a clip.

    Kinds are drawn evenly among those that apply; within a kind the answer is drawn first, evenly among the possible
    ones, so that neither "yes" nor a frequent word is a good guess.

    Args:
        subject: the scene or clip.
        seed: picks the questions; the same seed gives the same questions.
        n: how many; fewer are returned when the subject does not have so many different ones.
        kinds: ask only these.

    Raises:
        ValueError: if ``n`` is negative, a kind is unknown for this subject, or the subject shows no object.
    """
    makers = cast(Makers, clip_makers() if isinstance(subject, Clip) else SCENE_QUESTIONS)
    if n < 0:
        raise ValueError(f"n={n!r} must be >= 0")
    if not subject.objects:
        raise ValueError("subject shows no object, so there is nothing to ask about")
    unknown = [k for k in kinds or () if k not in makers]
    if unknown:
        raise ValueError(f"kinds has {unknown[0]!r}; for a {type(subject).__name__} valid are {', '.join(makers)}")
    rng = random.Random(seed)
    open_kinds = list(kinds or makers)
    asked: dict[str, Question] = {}
    fruitless = dict.fromkeys(open_kinds, 0)
    while open_kinds and len(asked) < n:
        kind = rng.choice(open_kinds)
        question = makers[kind](rng, subject)
        if question is not None and question.text not in asked:
            asked[question.text] = question
            continue
        fruitless[kind] += 1
        if fruitless[kind] == 8:
            open_kinds.remove(kind)
    return list(asked.values())


def clip_makers() -> Mapping[str, Callable[[random.Random, Clip], Question | None]]:
    """The question kinds of clips and how each is made."""
    from pared_zoo.world.clip_question import CLIP_QUESTIONS

    return CLIP_QUESTIONS


def ask_attribute(
    rng: random.Random,
    kind: str,
    obj: Object,
    objects: Sequence[Object],
    choices: tuple[str, ...],
    hidden: tuple[str, ...] = (),
) -> Question | None:
    """Ask for one attribute of an object among others."""
    answer = getattr(obj, kind)
    found = refer(rng, obj, objects, hidden=(kind, *hidden), group=(kind,))
    if found is None or rng.random() >= KEPT.get(answer, 1.0):
        return None
    name, many = found
    be = "are" if many else "is"
    texts = {
        "color": f"what color {be} the {name}?",
        "shape": f"what shape {be} the {name}?",
        "size": f"{be} the {name} small or large?",
        "texture": f"{be} the {name} plain, striped or dotted?",
    }
    return Question(texts[kind], answer, kind, choices)


def _attribute(kind: str, choices: tuple[str, ...]) -> Callable[[random.Random, Scene], Question | None]:
    def make(rng: random.Random, scene: Scene) -> Question | None:
        return ask_attribute(rng, kind, rng.choice(scene.objects), scene.objects, choices)

    return make


def ask_background(rng: random.Random, subject: Scene | Clip) -> Question:
    """Ask for the background colour."""
    return Question("what color is the background?", subject.background, "background", tuple(BACKGROUNDS))


def _count(rng: random.Random, scene: Scene) -> Question | None:
    by_count = {len(scene.objects): ["objects"]}
    for attributes in PHRASES:
        for words in (said(o, attributes) for o in scene.objects):
            by_count.setdefault(len(alike(words, scene.objects)), []).append(phrase(words, many=True))
    # Nothing is the answer to most things one could ask for, so it gets a share of its own.
    answer = 0 if rng.random() < 0.25 else rng.choice(sorted(by_count))
    if rng.random() >= KEPT.get(COUNT_WORDS[answer], 1.0):
        return None
    asked = rng.choice(by_count[answer]) if answer else phrase(_absent(rng, scene, rng.choice(PHRASES)), many=True)
    return Question(f"how many {asked} are there?", COUNT_WORDS[answer], "count", COUNT_WORDS)


def _exists(rng: random.Random, scene: Scene) -> Question:
    answer = rng.choice(YES_NO)
    attributes = rng.choice([p for p in PHRASES if len(p) > 1])
    words = said(rng.choice(scene.objects), attributes) if answer == "yes" else _absent(rng, scene, attributes)
    name = phrase(words)
    return Question(f"is there {'an' if name[0] in 'aeiou' else 'a'} {name}?", answer, "exists", YES_NO)


def _absent(rng: random.Random, scene: Scene, attributes: Sequence[str]) -> dict[str, str]:
    """Words that fit nothing in the scene, one word away from something that is there where possible."""
    for distance in range(1, 64):
        words = said(rng.choice(scene.objects), attributes)
        for attribute in rng.choices(attributes, k=1 + distance // 8):
            words[attribute] = rng.choice(_VOCABULARY[attribute])
        if not alike(words, scene.objects):
            return words
    raise AssertionError(f"a scene of {len(scene.objects)} objects shows every {attributes}")


def _related_pairs(scene: Scene) -> list[tuple[Object, str, Object]]:
    return [
        (a, relation, b)
        for a, b in itertools.permutations(scene.objects, 2)
        for relation in RELATIONS
        if holds(relation, np.array([a.x, a.y]), np.array([b.x, b.y]))
    ]


def _relation(rng: random.Random, scene: Scene) -> Question | None:
    named = _named_pair(rng, scene)
    if named is None:
        return None
    first, relation, second = named
    return Question(f"where is the {first} relative to the {second}?", relation, "relation", RELATIONS)


def _related(rng: random.Random, scene: Scene) -> Question | None:
    named = _named_pair(rng, scene)
    if named is None:
        return None
    first, relation, second = named
    answer = rng.choice(YES_NO)
    asked = relation if answer == "yes" else INVERSE[relation]
    return Question(f"is the {first} {asked} the {second}?", answer, "related", YES_NO)


def _named_pair(rng: random.Random, scene: Scene) -> tuple[str, str, str] | None:
    pairs = _related_pairs(scene)
    if not pairs:
        return None
    a, relation, b = rng.choice(pairs)
    first, second = refer(rng, a, scene.objects), refer(rng, b, scene.objects)
    return None if first is None or second is None else (first[0], relation, second[0])


def _two_hop(asked: str, choices: tuple[str, ...]) -> Callable[[random.Random, Scene], Question | None]:
    def make(rng: random.Random, scene: Scene) -> Question | None:
        # No third object may stand on that side at all, however the question is read.
        unique = [
            (a, relation, b)
            for a, relation, b in _related_pairs(scene)
            if not any(_beyond(relation, o, b) for o in scene.objects if o not in (a, b))
        ]
        if not unique:
            return None
        a, relation, b = rng.choice(unique)
        anchor = refer(rng, b, scene.objects)
        if anchor is None:
            return None
        text = f"what {asked} is the object {relation} the {anchor[0]}?"
        return Question(text, getattr(a, asked), f"two_hop_{asked}", choices)

    return make


def _beyond(relation: str, obj: Object, anchor: Object) -> bool:
    dx, dy = anchor.x - obj.x, anchor.y - obj.y
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] > 0


def _place(rng: random.Random, scene: Scene) -> Question | None:
    if scene.place is None:
        return None
    found = refer(rng, scene.objects[0], scene.objects)
    assert found is not None
    return Question(f"where is the {found[0]}?", scene.place, "place", tuple(PLACES))


_VOCABULARY: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "size": tuple(SIZES),
    "texture": TEXTURES,
}

#: Kinds of questions about a scene and how each is made; a maker returns None where its kind does not apply.
SCENE_QUESTIONS: dict[str, Callable[[random.Random, Scene], Question | None]] = {
    "color": _attribute("color", tuple(COLORS)),
    "shape": _attribute("shape", SHAPES),
    "size": _attribute("size", tuple(SIZES)),
    "texture": _attribute("texture", TEXTURES),
    "background": ask_background,
    "count": _count,
    "exists": _exists,
    "relation": _relation,
    "related": _related,
    "two_hop_color": _two_hop("color", tuple(COLORS)),
    "two_hop_shape": _two_hop("shape", SHAPES),
    "place": _place,
}
