"""How well pictures show what their captions say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from pared_zoo.world.detector import DetectedObject, Detection, detect
from pared_zoo.world.scene import Object, Scene

#: What can be right or wrong about a picture, in the order of reports.
ASPECTS: tuple[str, ...] = ("shape", "color", "size", "texture", "background", "relation", "place", "count")


def attribute_accuracy(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of what captions say that the pictures show.

    Args:
        images: uint8 array (pictures, side, side, 3).
        scenes: the scene behind each picture's caption; only what a caption can say of it is asked for.

    Returns:
        Fractions in 0 to 1 for the aspects that apply ("shape", "color", "size", "texture" over objects, "background",
        "count" over pictures, "relation" over pairs, "place" over placed objects) and "mean", their plain mean.

    Raises:
        ValueError: if the numbers of pictures and scenes differ or are zero.
    """
    if len(images) != len(scenes) or not scenes:
        raise ValueError(
            f"images and scenes must be equally many and at least one, not {len(images)} and {len(scenes)}"
        )
    verdicts: dict[str, list[bool]] = {aspect: [] for aspect in ASPECTS}
    for detection, scene in zip(detect(images), scenes, strict=True):
        for aspect, right in judge(detection, scene).items():
            verdicts[aspect] += right
    accuracy = {aspect: float(np.mean(right)) for aspect, right in verdicts.items() if right}
    accuracy["mean"] = float(np.mean(list(accuracy.values())))
    return accuracy


def judge(detection: Detection, scene: Scene) -> dict[str, list[bool]]:
    """Each claim of a scene's caption as right or wrong, grouped by aspect.

    Expected and found objects are matched so that most words agree. An object that was not found has every word wrong.
    A relation or place must hold under every best match: two objects that could be swapped prove no relation.
    """
    expected = scene.objects
    found: list[DetectedObject | None] = list(detection.objects)
    found += [None] * max(0, len(expected) - len(found))
    matches = list(permutations(range(len(found)), len(expected)))
    agreement = [sum(_agreement(o, found[k]) for o, k in zip(expected, match, strict=True)) for match in matches]
    best = [match for match, score in zip(matches, agreement, strict=True) if score == max(agreement)]
    verdicts: dict[str, list[bool]] = {"background": [detection.background == scene.background]}
    verdicts["count"] = [detection.count == len(expected)]
    pairs = [(o, found[k]) for o, k in zip(expected, best[0], strict=True)]
    for aspect in ("shape", "color", "size", "texture"):
        verdicts[aspect] = [f is not None and getattr(f, aspect) == getattr(o, aspect) for o, f in pairs]
    if scene.relation is not None:
        relation, count = scene.relation, detection.count
        verdicts["relation"] = [all(max(m[:2]) < count and detection.related(m[0], relation, m[1]) for m in best)]
    if scene.place is not None:
        places = [found[m[0]] for m in best]
        verdicts["place"] = [all(f is not None and f.place == scene.place for f in places)]
    return verdicts


def _agreement(expected: Object, found: DetectedObject | None) -> int:
    return 0 if found is None else sum(a == b for a, b in zip(expected.words, found.words, strict=True))
