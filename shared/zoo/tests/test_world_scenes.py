"""Scenes, their pictures and captions."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from pared_zoo.world import (
    BACKGROUNDS,
    COLORS,
    Object,
    Scene,
    SceneDistribution,
    caption,
    render,
    sample_scenes,
)
from pared_zoo.world.speed import render_speed

DIGEST = """
import hashlib
from pared_zoo.world import caption, clip_caption, questions, render, render_clips, sample_clips, sample_scenes
scenes, clips = sample_scenes(24, 91), sample_clips(24, 91)
said = [caption(s, i) for i, s in enumerate(scenes)] + [clip_caption(c, i) for i, c in enumerate(clips)]
asked = [questions(x, i, 4) for i, x in enumerate([*scenes, *clips])]
data = repr((scenes, clips, said, asked)).encode()
data += render(scenes, 32).tobytes() + render_clips(clips[:4], 32).tobytes()
digest = hashlib.sha256(data).hexdigest()
"""


def test_one_seed_gives_the_same_world_in_every_process():
    here: dict[str, str] = {}
    exec(DIGEST, here)
    there = subprocess.run(
        [sys.executable, "-c", DIGEST + "print(digest)"],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here["digest"]


def test_longer_samples_start_with_the_shorter_ones():
    assert sample_scenes(20, 5)[:7] == sample_scenes(7, 5)


def test_different_seeds_give_different_scenes():
    assert sample_scenes(5, 1) != sample_scenes(5, 2)


def test_scenes_of_the_shipped_models_do_not_change():
    """Models are trained on this stream: a changed digest means that their held-out scenes are no longer held out."""
    digest = hashlib.sha256(repr([(s.kind, caption(s, 3)) for s in sample_scenes(100, 0)]).encode()).hexdigest()
    assert digest[:16] == "e6a39d6b92c843d1"


def test_objects_lie_inside_the_picture_and_apart():
    for scene in sample_scenes(200, 11):
        boxes = np.array(scene.boxes)
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        for i, a in enumerate(scene.objects):
            for b in scene.objects[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_relation_holds_between_the_centres_of_a_pair():
    for scene in sample_scenes(200, 12):
        if scene.relation is not None:
            (a, b), axis = scene.objects, {"left of": 0, "right of": 0, "above": 1, "below": 1}[scene.relation]
            offset = (b.x - a.x, b.y - a.y)[axis] * (1 if scene.relation in ("left of", "above") else -1)
            assert offset > abs((b.y - a.y, b.x - a.x)[axis])


def test_distribution_limits_the_number_of_objects():
    scenes = sample_scenes(100, 13, SceneDistribution(max_objects=2))
    assert {len(s.objects) for s in scenes} == {1, 2}


def test_a_picture_has_the_background_at_its_border_and_the_colour_at_the_centre():
    obj = Object("circle", "red", "large", "plain", 0.5, 0.5, 0.19)
    picture = render([Scene((obj,), "navy", "single")], 64)[0]
    assert picture.dtype == np.uint8
    assert tuple(picture[0, 0]) == BACKGROUNDS["navy"]
    assert tuple(picture[32, 32]) == COLORS["red"]


def test_area_of_a_circle_is_that_of_its_radius():
    obj = Object("circle", "white", "large", "plain", 0.47, 0.53, 0.19)
    picture = render([Scene((obj,), "black", "single")], 128)[0, ..., 0].astype(float)
    dark, bright = BACKGROUNDS["black"][0], COLORS["white"][0]
    covered = ((picture - dark) / (bright - dark)).sum() / 128**2
    assert covered == pytest.approx(np.pi * 0.19**2, rel=0.01)


def test_pictures_do_not_depend_on_what_is_drawn_beside_them():
    scenes = sample_scenes(70, 14)
    together = render(scenes, 48)
    assert all(
        np.array_equal(render([s], 48)[0], picture) for s, picture in list(zip(scenes, together, strict=True))[::9]
    )


def test_no_scenes_give_no_pictures():
    assert render([], 32).shape == (0, 32, 32, 3)


def test_caption_names_every_attribute_in_all_its_paraphrases():
    for i, scene in enumerate(sample_scenes(100, 15)):
        for text in (caption(scene), caption(scene, i)):
            assert scene.background in text
            for obj in scene.objects:
                assert obj.shape in text
                assert obj.color in text
                assert obj.size in text
                assert obj.texture == "plain" or obj.texture in text


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: sample_scenes(-1, 0), "n=-1"),
        (lambda: render([], 8), "size=8"),
        (lambda: SceneDistribution(max_objects=5), "max_objects=5"),
        (lambda: SceneDistribution(kinds=(1.0, 2.0)), "kinds="),
        (lambda: SceneDistribution(texture_weights=(0.0, 0.0, 0.0)), "texture_weights="),
    ],
)
def test_wrong_input_is_named(call, argument):
    with pytest.raises(ValueError, match=argument):
        call()


def test_render_speed_counts_pictures_per_second():
    assert render_speed(16, pictures=64, rounds=1) > 0
