"""Clips do what their programs and captions say."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from pared_zoo.world import (
    BACKGROUNDS,
    CLIP_KINDS,
    DIRECTIONS,
    SPEEDS,
    Clip,
    ClipDistribution,
    Move,
    Object,
    Program,
    caption,
    clip_caption,
    detect,
    render,
    render_clip,
    render_clips,
    sample_clips,
)

FRAMES = 16


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return sample_clips(150, 501, FRAMES)


def of_kind(clips: list[Clip], *kinds: str) -> list[Clip]:
    chosen = [c for c in clips if c.kind in kinds]
    assert chosen
    return chosen


def test_every_kind_is_drawn(clips):
    assert {c.kind for c in clips} == set(CLIP_KINDS)


def test_frames_differ_exactly_where_the_clip_says_so(clips):
    for clip in clips[:40]:
        video = render(clip.scenes, 64).astype(int)
        assert np.array_equal(render_clip(clip, 64), video)
        differs = np.abs(np.diff(video, axis=0)).max(axis=(1, 2, 3)) > 0
        assert not clip.changed[0]
        assert np.array_equal(differs, clip.changed[1:])


def test_still_spans_are_still_and_as_long_as_possible(clips):
    for clip in of_kind(clips, "burst", "still_then_fast", "fast_then_still", "still")[:12]:
        video = render_clip(clip, 32)
        assert clip.still_spans
        for first, end in clip.still_spans:
            assert (video[first:end] == video[first]).all()
            assert end == clip.frames or clip.changed[end]
            assert first == 0 or clip.changed[first]


def test_still_clips_never_change(clips):
    assert all(c.still_spans == ((0, FRAMES),) for c in of_kind(clips, "still"))


def test_a_burst_is_still_at_both_ends_and_moves_between(clips):
    for clip in of_kind(clips, "burst"):
        moving = np.flatnonzero(clip.speed[:, 0])
        assert moving[0] > 1
        assert moving[-1] < FRAMES - 1
        assert np.array_equal(moving, np.arange(moving[0], moving[-1] + 1))


def test_a_bouncing_object_turns_back(clips):
    for clip in of_kind(clips, "bounce"):
        steps = np.diff(clip.centres[:, 0], axis=0).sum(axis=-1)
        assert steps.min() < 0 < steps.max()


def test_a_turn_changes_the_axis_of_motion(clips):
    for clip in of_kind(clips, "turn"):
        steps = np.diff(clip.centres[:, 0], axis=0)
        assert (np.count_nonzero(steps, axis=1) == 1).all()
        assert np.argmax(np.abs(steps[0])) != np.argmax(np.abs(steps[-1]))


def test_a_flash_shows_in_one_frame_only(clips):
    for clip in of_kind(clips, "flash"):
        assert clip.visible[:, 0].sum() == 1
        assert not clip.visible[[0, -1], 0].any()


def test_appearing_and_vanishing_objects_show_at_one_end(clips):
    assert all(tuple(c.visible[[0, -1], 0]) == (False, True) for c in of_kind(clips, "appear"))
    assert all(tuple(c.visible[[0, -1], 0]) == (True, False) for c in of_kind(clips, "vanish"))


def test_in_an_ordered_clip_the_second_starts_when_the_first_has_stopped(clips):
    for clip in of_kind(clips, "order"):
        first, second = (np.flatnonzero(clip.speed[:, k]) for k in (0, 1))
        assert first.max() < second.min()


def test_a_recolored_object_changes_its_colour_once(clips):
    for clip in of_kind(clips, "recolor"):
        colors = [scene.objects[0].color for scene in clip.scenes]
        assert len(set(colors)) == 2
        assert sum(a != b for a, b in pairwise(colors)) == 1


def test_a_pair_keeps_its_relation(clips):
    for clip in of_kind(clips, "pair"):
        dx, dy = (clip.centres[:, 1] - clip.centres[:, 0]).T
        along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[clip.relation]
        assert (along > 0.09).all()


def test_objects_stay_inside_and_never_touch(clips):
    for clip in clips:
        boxes, centres = clip.boxes, clip.centres
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        for i, a in enumerate(clip.objects):
            for j, b in enumerate(clip.objects[:i]):
                assert (np.linalg.norm(centres[:, i] - centres[:, j], axis=-1) > a.radius + b.radius).all()


def test_the_detector_finds_the_objects_where_the_boxes_are(clips):
    clip = next(c for c in clips if c.kind == "fast" and len(c.objects) == 3)
    for f, detection in zip((0, 8, 15), detect(render_clip(clip, 64)[[0, 8, 15]]), strict=True):
        assert detection.count == 3
        for obj, (x, y) in zip(clip.objects, clip.centres[f], strict=True):
            match = next(d for d in detection.objects if d.words == obj.words)
            assert np.hypot(match.x - x, match.y - y) < 0.01


def test_what_shows_in_a_frame_lies_in_the_boxes_of_that_frame():
    side = 128
    for clip in sample_clips(30, 503, 8, ClipDistribution(max_objects=1)):
        ink = (render_clip(clip, side) != BACKGROUNDS[clip.background]).any(axis=-1)
        for f in range(clip.frames):
            assert ink[f].any() == clip.visible[f, 0]
            if clip.visible[f, 0]:
                (y0, *_, y1), (x0, *_, x1) = (np.flatnonzero(ink[f].any(axis=axis)) for axis in (1, 0))
                shown, box = np.array([x0, y0, x1 + 1, y1 + 1]), clip.boxes[f, 0] * side
                # A diamond's tips stick out by a twentieth of its radius; triangles and squares fill less than the box.
                slack = 1.5 + 0.05 * clip.objects[0].radius * side
                assert (shown[:2] > box[:2] - slack).all()
                assert (shown[2:] < box[2:] + slack).all()
                if clip.objects[0].shape in ("circle", "ring", "cross"):
                    assert np.abs(shown - box).max() < 1.5


@pytest.mark.parametrize("frames", [8, 9, 33])
def test_clips_have_any_length_and_the_words_for_speed_hold(frames):
    for clip in sample_clips(30, 502, frames, ClipDistribution(kinds={"slow": 1, "fast": 1})):
        low, high = SPEEDS["slowly" if clip.kind == "slow" else "quickly"]
        assert clip.centres.shape == (frames, len(clip.objects), 2)
        assert low <= np.linalg.norm(clip.centres[-1, 0] - clip.centres[0, 0]) <= high


def test_render_clips_equals_clip_by_clip(clips):
    together = render_clips(clips[:5], 32)
    assert together.shape == (5, FRAMES, 32, 32, 3)
    assert all(np.array_equal(render_clip(c, 32), video) for c, video in zip(clips[:5], together, strict=True))


def test_a_program_written_by_hand_moves_as_it_says():
    obj = Object("circle", "red", "small", "plain", 0.3, 0.5, 0.11)
    clip = Clip((obj,), (Program((Move(2, 6, "right", 0.1),)),), "gray", "burst", 8)
    assert clip.centres[:, 0, 0] == pytest.approx([0.3, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7, 0.7])
    assert clip.still_spans == ((0, 3), (6, 8))
    assert clip.speed[:, 0] == pytest.approx([0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0])


def test_an_object_that_does_not_show_has_no_speed():
    obj = Object("circle", "red", "small", "plain", 0.3, 0.5, 0.11)
    clip = Clip((obj,), (Program((Move(0, 7, "right", 0.05),), appears=3, vanishes=6),), "gray", "fast", 8)
    assert clip.speed[:, 0] == pytest.approx([0, 0, 0, 0, 0.05, 0.05, 0, 0])
    assert clip.still_spans == ((0, 3), (6, 8))


@pytest.mark.parametrize(
    ("recolor", "appears", "changed"),
    [((0, "blue"), 0, []), ((4, "red"), 0, []), ((9, "blue"), 0, []), ((4, "blue"), 6, [6]), ((4, "blue"), 0, [4])],
)
def test_a_new_colour_changes_a_frame_only_where_it_shows(recolor, appears, changed):
    obj = Object("circle", "red", "small", "plain", 0.3, 0.5, 0.11)
    clip = Clip((obj,), (Program(appears=appears, recolor=recolor),), "gray", "recolor", 8)
    assert np.flatnonzero(clip.changed).tolist() == changed
    video = render(clip.scenes, 32).astype(int)
    assert np.flatnonzero(np.abs(np.diff(video, axis=0)).max(axis=(1, 2, 3))).tolist() == [f - 1 for f in changed]
    assert np.array_equal(render_clip(clip, 32), video)


def test_every_frame_has_a_caption(clips):
    for clip in clips[:30]:
        for scene in clip.scenes[:: FRAMES - 1]:
            assert caption(scene).count(" and ") == (len(scene.objects) > 1)


def test_captions_tell_in_which_order_objects_move(clips):
    patterns = (r"first (?P<first>.*), then (?P<second>.*)", r"(?P<first>.*) before (?P<second>.*)",
                r"(?P<second>.*) after (?P<first>.*)")  # fmt: skip
    for clip in of_kind(clips, "order"):
        for seed in (None, 0, 1, 2, 3):
            text = clip_caption(clip, seed)
            told = next(found for pattern in patterns if (found := re.search(pattern, text)))
            assert clip.objects[0].shape in told["first"]
            assert clip.objects[1].shape in told["second"]


def test_captions_name_the_direction_of_every_move(clips):
    stem = {"left": "left", "right": "right", "up": ("up", "top"), "down": ("down", "bottom")}
    for i, clip in enumerate(of_kind(clips, "slow", "fast", "turn", "order", "burst")):
        for text in (clip_caption(clip), clip_caption(clip, i)):
            steps = np.diff(clip.centres, axis=0)
            for word, direction in DIRECTIONS.items():
                if ((steps @ np.array(direction)) > 1e-9).any():
                    words = stem[word] if isinstance(stem[word], tuple) else (stem[word],)
                    assert any(w in text for w in words), text


def test_captions_of_one_clip_differ_by_seed_and_repeat_for_one_seed(clips):
    clip = clips[0]
    assert len({clip_caption(clip, i) for i in range(8)}) > 1
    assert clip_caption(clip, 4) == clip_caption(clip, 4)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: sample_clips(-1, 0), "n=-1"),
        (lambda: sample_clips(1, 0, frames=4), "frames=4"),
        (lambda: ClipDistribution(kinds={"jump": 1.0}), "jump"),
        (lambda: ClipDistribution(kinds={"order": 1.0}, max_objects=1), "kinds="),
        (lambda: ClipDistribution(max_objects=0), "max_objects=0"),
        (lambda: ClipDistribution(texture_weights=(1.0,)), "texture_weights="),
        (lambda: Move(3, 3, "left", 0.1), "start=3 and stop=3"),
        (lambda: Move(0, 3, "north", 0.1), "direction='north' must be one of left"),
        (lambda: Program((Move(0, 4, "left", 0.1), Move(2, 6, "up", 0.1))), "must be in order"),
        (lambda: Program(recolor=(3, "pink")), "recolor='pink'"),
        (lambda: Clip((), (), "gray", "still", 8), "at least one, not 0 and 0"),
        (lambda: Clip((), (), "pink", "still", 8), "background='pink'"),
        (lambda: Clip((), (), "gray", "jump", 8), "kind='jump'"),
        (lambda: Clip((), (), "gray", "pair", 8), "relation='None'"),
    ],
)
def test_wrong_input_is_named(call, argument):
    with pytest.raises(ValueError, match=argument):
        call()


def test_clips_of_different_length_are_not_drawn_together(clips):
    with pytest.raises(ValueError, match=r"\[8, 16\]"):
        render_clips([clips[0], *sample_clips(1, 0, 8)], 32)
