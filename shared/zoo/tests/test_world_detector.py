"""The detector reads back what the renderer drew."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from pared_zoo.world import Detection, Object, Scene, attribute_accuracy, detect, judge, render, sample_scenes
from pared_zoo.world.score import ASPECTS


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(80, 20261)


@pytest.fixture(scope="module")
def pictures(scenes):
    return render(scenes, 64)


@pytest.fixture(scope="module")
def found(pictures):
    return detect(pictures)


def soften(pictures: np.ndarray, seed: int) -> np.ndarray:
    """Blur with a standard deviation of 0.7 pixels and add noise with one of 6 grey levels."""
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / 0.7) ** 2)
    kernel /= kernel.sum()
    soft = pictures.astype(np.float64)
    for axis in (1, 2):
        padded = np.pad(soft, [(3, 3) if k == axis else (0, 0) for k in range(4)], mode="edge")
        soft = sum(w * np.take(padded, np.arange(64) + k, axis=axis) for k, w in enumerate(kernel))
    noisy = soft + np.random.default_rng(seed).normal(0, 6, soft.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def tally(detections: list[Detection], scenes) -> dict[str, float]:
    verdicts = [judge(d, s) for d, s in zip(detections, scenes, strict=True)]
    return {a: float(np.mean([v for one in verdicts for v in one.get(a, [])])) for a in ASPECTS}


def test_every_attribute_of_clean_pictures_is_read(found, scenes):
    assert min(tally(found, scenes).values()) > 0.995


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 128])
def test_every_attribute_of_a_thousand_clean_pictures_is_read(size):
    scenes = sample_scenes(1000, 20263)
    assert min(attribute_accuracy(render(scenes, size), scenes).values()) > 0.995


def test_soft_and_noisy_pictures_are_read_nearly_as_well(pictures, scenes):
    accuracy = attribute_accuracy(soften(pictures[:40], 3), scenes[:40])
    assert min(accuracy.values()) > 0.95


@pytest.mark.parametrize(
    ("size", "pictures", "least"), [(32, 60, 0.995), (48, 20, 0.999), (100, 12, 0.999), (256, 12, 0.999)]
)
def test_other_resolutions_are_read(size, pictures, least):
    scenes = sample_scenes(pictures, 20262)
    assert attribute_accuracy(render(scenes, size), scenes)["mean"] > least


def test_centres_and_radii_are_those_of_the_scene(found, scenes):
    for detection, scene in zip(found, scenes, strict=True):
        for obj in scene.objects:
            nearest = min(detection.objects, key=lambda o: np.hypot(o.x - obj.x, o.y - obj.y))
            assert np.hypot(nearest.x - obj.x, nearest.y - obj.y) < 0.01
            assert nearest.radius == pytest.approx(obj.radius, abs=0.01)
            assert nearest.box == pytest.approx(obj.box, abs=0.02)


def test_pictures_of_other_scenes_score_near_chance(found, scenes):
    accuracy = tally(found, scenes[1:] + scenes[:1])
    assert accuracy["color"] < 0.4
    assert accuracy["shape"] < 0.4
    assert accuracy["relation"] < 0.4


def test_an_empty_picture_has_every_word_wrong_but_the_background(scenes):
    pictures = render([dataclasses.replace(s, objects=()) for s in scenes[:10]], 64)
    accuracy = attribute_accuracy(pictures, scenes[:10])
    assert accuracy["background"] == 1
    assert {accuracy[a] for a in ("shape", "color", "size", "texture", "count")} == {0.0}


def test_a_mirrored_pair_has_the_relation_wrong_and_the_words_right(scenes):
    pairs = [s for s in scenes if s.relation in ("left of", "right of")]
    other = {"left of": "right of", "right of": "left of"}
    mirrored = [
        dataclasses.replace(s, objects=tuple(dataclasses.replace(o, x=1 - o.x) for o in s.objects)) for s in pairs
    ]
    accuracy = attribute_accuracy(render(mirrored, 64), pairs)
    assert accuracy["relation"] == 0
    assert accuracy["color"] == 1
    relabelled = [dataclasses.replace(s, relation=other[s.relation]) for s in pairs]
    assert attribute_accuracy(render(mirrored, 64), relabelled)["relation"] == 1


def test_two_equal_objects_prove_no_relation():
    red, blue = (Object("circle", color, "small", "plain", x, 0.5, 0.11) for color, x in (("red", 0.3), ("blue", 0.7)))
    asked = Scene((red, blue), "gray", "pair", relation="left of")
    shown = dataclasses.replace(asked, objects=(red, dataclasses.replace(blue, color="red")))
    verdict = judge(detect(render([shown], 64))[0], asked)
    assert verdict["color"] == [True, False]
    assert verdict["relation"] == [False]


def test_an_object_moved_from_its_place_has_the_place_wrong(scenes):
    placed = [s for s in scenes if s.place == "on the left"]
    moved = [dataclasses.replace(s, objects=(dataclasses.replace(s.objects[0], x=0.7),)) for s in placed]
    assert attribute_accuracy(render(moved, 64), placed)["place"] == 0


def test_a_missing_object_makes_the_count_wrong(scenes):
    counted = [s for s in scenes if s.kind == "count"]
    fewer = [dataclasses.replace(s, objects=s.objects[1:]) for s in counted]
    accuracy = attribute_accuracy(render(fewer, 64), counted)
    assert accuracy["count"] == 0
    assert 0 < accuracy["color"] < 1


def test_relations_of_a_detection_come_in_inverse_pairs(found):
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for detection in found[:20]:
        relations = set(detection.relations)
        assert relations == {(j, inverse[r], i) for i, r, j in relations}


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8), np.zeros((1, 64, 32, 3), np.uint8), [1]],
)
def test_wrong_pictures_are_refused(images):
    with pytest.raises(ValueError, match="images"):
        detect(images)


def test_pictures_and_scenes_must_be_equally_many(pictures, scenes):
    with pytest.raises(ValueError, match="3 and 2"):
        attribute_accuracy(pictures[:3], scenes[:2])
