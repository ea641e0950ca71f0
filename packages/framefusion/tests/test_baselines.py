"""The methods FrameFusion is compared with: which tokens each leaves."""

from __future__ import annotations

import pytest
import torch
from framefusion.baselines import (
    apply_evs,
    apply_fastv,
    apply_frame_subsample,
    apply_random,
    apply_window,
    fastv_share,
)
from pared_hooks import AlreadyAppliedError, ConfigError
from test_families import greedy, logits


@pytest.fixture
def case(tiny, rng):
    family, model = tiny("llava-onevision")
    return model, family.batch(family.prompt(rng, ("text", 3), ("video", 8), ("text", 4)))


START = 4


def left(handle):
    """Vision tokens left of the last prompt, as (frame, patch)."""
    kept = handle.kept[0]
    places = kept[(kept >= START) & (kept < START + 128)] - START
    return [(int(place) // 16, int(place) % 16) for place in places]


def test_whole_frames_are_spread_evenly(case):
    model, inputs = case
    with apply_frame_subsample(model, 0.25) as handle:
        logits(model, inputs)
        assert sorted({frame for frame, _ in left(handle)}) == [3, 7]
        assert len(left(handle)) == 32


def test_a_window_keeps_the_first_and_the_latest(case):
    model, inputs = case
    with apply_window(model, 0.25, sinks=4) as handle:
        logits(model, inputs)
        assert left(handle) == [(0, patch) for patch in range(4)] + [(n // 16, n % 16) for n in range(100, 128)]


def test_evs_drops_what_is_like_the_frame_before_and_keeps_the_first_frame(case):
    model, inputs = case
    inputs["pixel_values_videos"][:, 3] = inputs["pixel_values_videos"][:, 2]
    with apply_evs(model, 0.5) as handle:
        logits(model, inputs)
        frames = [frame for frame, _ in left(handle)]
        assert frames.count(0) == 16
        assert 3 not in frames
        assert len(frames) == 64


def test_random_tokens_follow_the_generator(case):
    model, inputs = case
    found = []
    for seed in (0, 0, 1):
        with apply_random(model, 0.5, torch.Generator().manual_seed(seed)) as handle:
            logits(model, inputs)
            found.append(left(handle))
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 64


def test_fastv_prunes_at_its_layer_by_the_attention_before(case):
    model, inputs = case
    with apply_fastv(model, layer=2, keep=0.25) as handle:
        logits(model, inputs)
        assert handle.stats()["attention_tokens"] == [128, 128, 32, 32]
        assert handle.stats()["cost"] == pytest.approx((2 + 2 * 0.25) / 4)
        assert greedy(model, inputs).shape[1] == inputs["input_ids"].shape[1] + 5
        with pytest.raises(AlreadyAppliedError):
            apply_fastv(model)
    assert fastv_share(0.625, 2, 4) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda model: apply_fastv(model, 0), "layer = 0"),
        (lambda model: apply_fastv(model, 2, 0.0), "keep = 0.0"),
        (lambda model: apply_evs(model, 1.0), "1 - rate"),
        (lambda model: apply_window(model, 1.5), "keep = 1.5"),
    ],
)
def test_wrong_shares_are_named(make, named, case):
    with pytest.raises(ConfigError, match=named):
        make(case[0])
