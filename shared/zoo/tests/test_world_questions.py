"""Answers agree with an independent reading of the question."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from pared_zoo.world import Clip, Scene, detect, questions, render, sample_clips, sample_scenes
from pared_zoo.world.clip_question import CLIP_QUESTIONS
from pared_zoo.world.question import SCENE_QUESTIONS, Question

NUMBERS = ("zero", "one", "two", "three", "four")
WORDS = {
    "shape": ("circle", "square", "triangle", "diamond", "cross", "ring"),
    "color": ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"),
    "size": ("small", "large"),
    "texture": ("plain", "striped", "dotted"),
}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return sample_scenes(120, 601)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return sample_clips(250, 602)


def meant(phrase: str, objects: list) -> list[int]:
    """Indices of the objects that every word of a phrase fits."""
    words = {re.sub(r"(?<=cross)es$|(?<!s)s$", "", word) for word in phrase.split()}
    wanted = {a: single(words & set(known)) for a, known in WORDS.items() if words & set(known)}
    return [i for i, o in enumerate(objects) if all(getattr(o, a) == w for a, w in wanted.items())]


def single(values) -> str:
    assert len(set(values)) == 1
    return next(iter(values))


def side(a, relation: str, b) -> bool:
    return {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[relation]


def answer_about_objects(text: str, objects: list, background: str) -> str:
    """Answer a question about a picture from its objects, by reading the text."""
    if "background" in text:
        return background
    if found := re.fullmatch(r"how many (.*) are there\?", text):
        return NUMBERS[len(meant(found[1], objects))]
    if found := re.fullmatch(r"is there an? (.*)\?", text):
        return "yes" if meant(found[1], objects) else "no"
    if found := re.fullmatch(r"what (\w+) is the object (left of|right of|above|below) the (.*)\?", text):
        (anchor,) = meant(found[3], objects)
        (there,) = [o for i, o in enumerate(objects) if i != anchor and side(o, found[2], objects[anchor])]
        return getattr(there, found[1])
    if found := re.fullmatch(r"what (\w+) (?:is|are) the (.*)\?", text):
        return single([getattr(objects[i], found[1]) for i in meant(found[2], objects)])
    if found := re.fullmatch(r"(?:is|are) the (.*) small or large\?", text):
        return single([objects[i].size for i in meant(found[1], objects)])
    if found := re.fullmatch(r"(?:is|are) the (.*) plain, striped or dotted\?", text):
        return single([objects[i].texture for i in meant(found[1], objects)])
    if found := re.fullmatch(r"where is the (.*) relative to the (.*)\?", text):
        (i,), (j,) = meant(found[1], objects), meant(found[2], objects)
        dx, dy = objects[i].x - objects[j].x, objects[i].y - objects[j].y
        return ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    if found := re.fullmatch(r"is the (.*) (left of|right of|above|below) the (.*)\?", text):
        (i,), (j,) = meant(found[1], objects), meant(found[3], objects)
        return "yes" if side(objects[i], found[2], objects[j]) else "no"
    if found := re.fullmatch(r"where (?:is|are) the (.*)\?", text):
        (i,) = meant(found[1], objects)
        return objects[i].place
    raise AssertionError(f"unread question: {text}")


def answer_about_clip(question: Question, clip: Clip) -> str:
    """Answer from the tracks, the visible frames and the colours of a clip."""
    text, tracks, visible = question.text, clip.centres, clip.visible
    steps = np.diff(tracks, axis=0)
    moving = np.abs(steps).sum(axis=-1) > 1e-9
    colors = [{s.color for s in clip.scenes[-1].objects if s.shape == o.shape} for o in clip.objects]

    def deed(k: int) -> str:
        if not visible[:, k].all():
            return "appear" if visible[-1, k] else ("disappear" if visible[0, k] else "flash")
        if colors[k] != {clip.objects[k].color}:
            return "change color"
        if not moving[:, k].any():
            return "stay still"
        axes = steps[:, k][moving[:, k]]
        return "bounce" if (axes.max(axis=0) * axes.min(axis=0) < -1e-12).any() else "move"

    def way(step: np.ndarray) -> str:
        if abs(step[0]) > abs(step[1]):
            return "left" if step[0] < 0 else "right"
        return "up" if step[1] < 0 else "down"

    objects = list(clip.objects)
    if text == "how many objects move?":
        return NUMBERS[int(moving.any(axis=0).sum())]
    if found := re.fullmatch(r"what (\w+) is the object that moves (first|last)\?", text):
        order = np.argsort([moving[:, k].argmax() if moving[:, k].any() else 999 for k in range(len(objects))])
        return getattr(objects[order[0 if found[2] == "first" else 1]], found[1])
    if found := re.fullmatch(r"what (\w+) is the object that (.*)\?", text):
        stem = {"moves": "move", "bounces": "bounce", "changes color": "change color", "flashes": "flash"}
        wanted = stem.get(found[2], found[2].rstrip("s"))
        return single([getattr(o, found[1]) for k, o in enumerate(objects) if deed(k) == wanted])
    if found := re.fullmatch(r"what do(?:es)? the (.*) do\?", text):
        return single([deed(k) for k in meant(found[1], objects)])
    if found := re.fullmatch(r"do(?:es)? the (.*) move slowly or quickly\?", text):
        k = meant(found[1], objects)[0]
        return "quickly" if np.abs(tracks[-1, k] - tracks[0, k]).max() > 0.35 else "slowly"
    if found := re.fullmatch(r"does the (.*) move (before|after) the (.*)\?", text):
        (i,), (j,) = meant(found[1], objects), meant(found[3], objects)
        earlier = moving[:, i].argmax() < moving[:, j].argmax()
        return "yes" if earlier == (found[2] == "before") else "no"
    if found := re.fullmatch(r"which way do(?:es)? the (.*) move( first| last)?\?", text):
        k = meant(found[1], objects)[0]
        own = steps[:, k][moving[:, k]]
        assert (found[2] is None) == (len({way(s) for s in own}) == 1)
        return way(own[-1] if found[2] == " last" else own[0])
    if found := re.fullmatch(r"do(?:es)? the (.*) move\?", text):
        return "yes" if moving[:, meant(found[1], objects)].any() else "no"
    if found := re.fullmatch(r"does the (.*) wait before moving\?", text):
        return "no" if moving[0, meant(found[1], objects)[0]] else "yes"
    if found := re.fullmatch(r"does the (.*) stop before the end\?", text):
        return "no" if moving[-1, meant(found[1], objects)[0]] else "yes"
    if found := re.fullmatch(r"what color does the (.*) turn to\?", text):
        return single(colors[single(meant(found[1], objects))])
    if found := re.fullmatch(r"what color is the (.*) at first\?", text):
        return objects[single(meant(found[1], objects))].color
    return answer_about_objects(text, objects, clip.background)


def test_answers_about_scenes_agree_with_what_the_detector_sees(scenes):
    for i, (scene, seen) in enumerate(zip(scenes, detect(render(scenes, 64)), strict=True)):
        for question in questions(scene, i, 6):
            assert answer_about_objects(question.text, list(seen.objects), seen.background) == question.answer


@pytest.mark.parametrize("kind", sorted(SCENE_QUESTIONS))
def test_answers_about_scenes_are_right_for_every_kind(kind, scenes):
    asked = [(q, s) for i, s in enumerate(scenes) for q in questions(s, i, 2, kinds=[kind])]
    assert asked
    for question, scene in asked:
        assert question.kind == kind
        assert question.answer in question.choices
        if kind == "place":
            assert question.answer == scene.place
        else:
            assert answer_about_objects(question.text, list(scene.objects), scene.background) == question.answer


@pytest.mark.parametrize("kind", sorted(CLIP_QUESTIONS))
def test_answers_about_clips_are_right_for_every_kind(kind, clips):
    asked = [(q, c) for i, c in enumerate(clips) for q in questions(c, i, 2, kinds=[kind])]
    assert asked
    for question, clip in asked:
        assert question.kind == kind
        assert question.answer in question.choices
        assert answer_about_clip(question, clip) == question.answer, question


@pytest.mark.parametrize("kind", ["related", "exists"])
def test_yes_and_no_are_equally_frequent_about_scenes(kind):
    answers = Counter(q.answer for i, s in enumerate(sample_scenes(300, 603)) for q in questions(s, i, 1, kinds=[kind]))
    assert abs(answers["yes"] - answers["no"]) < 3 * np.sqrt(answers.total()) + 1


@pytest.mark.parametrize("kind", ["moves", "pause", "order"])
def test_yes_and_no_are_equally_frequent_about_clips(kind):
    answers = Counter(q.answer for i, c in enumerate(sample_clips(400, 604)) for q in questions(c, i, 1, kinds=[kind]))
    assert abs(answers["yes"] - answers["no"]) < 3 * np.sqrt(answers.total()) + 1


@pytest.mark.parametrize(("kind", "largest"), [("color", 0.2), ("shape", 0.25), ("size", 0.6), ("texture", 0.45)])
def test_no_attribute_is_a_good_guess(kind, largest, scenes):
    answers = Counter(q.answer for i, s in enumerate(scenes) for q in questions(s, i, 8) if q.kind == kind)
    assert max(answers.values()) / answers.total() < largest


def test_questions_repeat_for_a_seed_and_differ_within_a_scene(scenes):
    asked = questions(scenes[0], 9, 8)
    assert asked == questions(scenes[0], 9, 8)
    assert len({q.text for q in asked}) == len(asked) == 8


def test_a_kind_that_does_not_apply_gives_no_questions(scenes):
    single_object = next(s for s in scenes if s.kind == "single")
    assert questions(single_object, 0, 3, kinds=["relation"]) == []


def test_wrong_input_is_named(scenes, clips):
    with pytest.raises(ValueError, match="shows no object"):
        questions(Scene((), "gray", "list"), 0, 1)
    with pytest.raises(ValueError, match="n=-1"):
        questions(scenes[0], 0, -1)
    with pytest.raises(ValueError, match="taste"):
        questions(scenes[0], 0, 1, kinds=["taste"])
    with pytest.raises(ValueError, match="Clip valid are"):
        questions(clips[0], 0, 1, kinds=["two_hop_color"])
