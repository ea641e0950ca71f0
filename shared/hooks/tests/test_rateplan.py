"""RatePlan: rules, the numbers derived from it, and the JSON that vgdfr and dlfr-vae exchange."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pared_hooks import ConfigError, RatePlan


@st.composite
def plans(draw):
    stride = draw(st.sampled_from([1, 2, 4, 8]))
    segments, frame = [], 1
    for _ in range(draw(st.integers(0, 5))):
        frame += stride * draw(st.integers(0, 3))
        rate = draw(st.sampled_from([2, 3, 4]))
        length = stride * rate * draw(st.integers(1, 3))
        segments.append((frame, length, rate))
        frame += length
    return RatePlan(frame + stride * draw(st.integers(0, 3)), stride, tuple(segments))


@given(plans())
def test_json_brings_back_an_equal_plan(plan):
    assert RatePlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["schema"] == "pared.rateplan/1"


@given(plans())
def test_kept_frames_fill_the_kept_latents(plan):
    assert len(plan.frame_keep) == 1 + plan.stride * (plan.num_latents - 1)
    assert len(plan.times()) == len(plan.frame_keep)
    assert sorted(plan.times()) == list(plan.times())
    merged = {frame for group in plan.groups for frame in group}
    assert merged | set(plan.frame_keep) == set(range(plan.num_frames))
    assert 0 < plan.latent_ratio <= 1


def test_a_double_rate_segment_keeps_every_second_latent_and_shows_the_centre_of_each_pair():
    plan = RatePlan(17, 4, ((1, 8, 2),))
    assert plan.groups == ((1, 2), (3, 4), (5, 6), (7, 8))
    assert plan.frame_keep == (0, 1, 3, 5, 7, 9, 10, 11, 12, 13, 14, 15, 16)
    assert plan.latent_keep == (0, 1, 3, 4)
    assert plan.times()[:5] == (0.0, 1.5, 3.5, 5.5, 7.5)
    assert plan.latent_ratio == 4 / 5


def test_a_quadruple_rate_segment_drops_three_of_four_latents():
    assert RatePlan(33, 4, ((17, 16, 4),)).latent_keep == (0, 1, 2, 3, 4, 5)


@given(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=6), st.integers(0, 3))
def test_chunk_rates_come_back(rates, tail):
    plan = RatePlan.from_chunks(1 + 16 * len(rates) + 4 * tail, 16, rates)
    assert plan.rates(16) == tuple(rates)


def test_rates_of_chunks_that_a_segment_cuts_are_an_error():
    with pytest.raises(ConfigError, match="cut through its chunks"):
        RatePlan(33, 4, ((9, 16, 2),)).rates(16)


@pytest.mark.parametrize(
    ("num_frames", "segments", "message"),
    [
        (16, (), "such as 13 or 17"),
        (17, ((0, 8, 2),), "start >= 1"),
        (17, ((1, 8, 1),), "rate >= 2"),
        (17, ((2, 8, 2),), "start of 1 plus a multiple of 4"),
        (17, ((1, 4, 2),), "a multiple of stride \\* rate = 8"),
        (17, ((1, 8, 2), (5, 8, 2)), "start >= 9"),
        (17, ((9, 16, 2),), "an end within 17 frames"),
    ],
)
def test_a_broken_rule_says_what_is_valid(num_frames, segments, message):
    with pytest.raises(ConfigError, match=message):
        RatePlan(num_frames, 4, segments)


def test_one_rate_for_each_chunk_is_needed():
    with pytest.raises(ConfigError, match="one for each of the 2 whole chunks of 16 frames"):
        RatePlan.from_chunks(33, 16, [2])
