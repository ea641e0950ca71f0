from __future__ import annotations

import pytest
from dato import FULL, Policy, PolicyError, UnitCosts, preset_names


@pytest.fixture
def costs() -> UnitCosts:
    """A model of two units: 100 FLOPs in full, 10 and 40 at depths 1 and 2, no attention."""
    return UnitCosts(full=100.0, depth=(0.0, 10.0, 40.0), attention=())


def test_one_ratio_stands_for_all_calls():
    assert Policy([FULL, 1, 0], 0.3).ratio == (0.3, 0.3, 0.3)


@pytest.mark.parametrize(
    ("depth", "ratio", "field"),
    [
        ([], 0.4, "depth"),
        ([FULL, -2], 0.4, "depth"),
        ([FULL, 1.5], 0.4, "depth"),
        (3, 0.4, "depth"),
        ([FULL, 1], [0.4], "ratio"),
        ([FULL], 1.0, "ratio"),
        ([FULL], -0.1, "ratio"),
        ([FULL], float("nan"), "ratio"),
        ([FULL], "much", "ratio"),
    ],
)
def test_a_malformed_policy_names_the_field(depth, ratio, field):
    with pytest.raises(PolicyError) as caught:
        Policy(depth, ratio)
    assert caught.value.field == field


def test_json_brings_the_policy_back():
    policy = Policy([FULL, 0, 2], [0.1, 0.2, 0.3])
    assert Policy.from_json(policy.to_json()) == policy


def test_uniform_is_full_at_every_interval():
    assert Policy.uniform(7, 3).depth == (FULL, 1, 1, FULL, 1, 1, FULL)
    assert Policy.uniform(4, 2, depth=3).depth == (FULL, 3, FULL, 3)


@pytest.mark.parametrize(("n", "interval"), [(0, 2), (4, 0)])
def test_uniform_refuses_no_calls_and_no_interval(n, interval):
    with pytest.raises(PolicyError, match="at least 1"):
        Policy.uniform(n, interval)


@pytest.mark.parametrize(
    ("name", "skip", "shallow", "full"), [("sd15-coco", 25, 21, 4), ("sd15-alt", 24, 22, 4), ("sd15-mild", 7, 38, 5)]
)
def test_presets_have_the_published_number_of_calls_of_each_kind(name, skip, shallow, full):
    policy = Policy.from_preset(name)
    assert policy.actions() == {"full": full + 1, "depth-1": shallow, "skip": skip}
    assert policy.num_calls == 51
    assert set(policy.ratio) == {0.4}


def test_uniform_presets_fit_any_number_of_calls():
    assert Policy.from_preset("uniform-3", 5).depth == (FULL, 1, 1, FULL, 1)


@pytest.mark.parametrize("name", ["sd15", "uniform-0", "uniform-", "../config"])
def test_an_unknown_preset_lists_the_known_ones(name):
    with pytest.raises(PolicyError, match="sd15-alt, sd15-coco, sd15-mild, uniform-N"):
        Policy.from_preset(name)


def test_preset_names_are_the_shipped_files():
    assert preset_names() == ("sd15-alt", "sd15-coco", "sd15-mild")


def test_a_run_from_the_middle_keeps_the_tail_and_starts_full():
    policy = Policy([FULL, 1, 1, 0, 1, 0, 1, 0, 0, 1], [0.1 * i for i in range(10)])
    tail = policy.for_run(10, first_call=3)
    assert tail.depth == (FULL, 1, 0, 1, 0, 0, 1)
    assert tail.ratio == policy.ratio[3:]


def test_a_short_run_computes_its_last_call_and_says_so():
    with pytest.warns(UserWarning, match="4 denoiser calls"):
        assert Policy.uniform(51, 10).for_run(4).depth == (FULL, 1, 1, FULL)


def test_a_run_of_five_calls_follows_the_policy():
    assert Policy([FULL, 0, 1, 1, 0]).for_run(5).depth == (FULL, 0, 1, 1, 0)


@pytest.mark.parametrize("first_call", [-1, 4])
def test_a_run_must_start_within_its_calls(first_call):
    with pytest.raises(PolicyError, match=r"outside 0\.\.3"):
        Policy([FULL, 1]).for_run(4, first_call)


def test_the_ratio_can_be_replaced():
    assert Policy([FULL, 1], [0.1, 0.2]).with_ratio(0).ratio == (0.0, 0.0)


def test_cost_counts_the_first_call_as_full(costs):
    assert Policy([1, 1, 0, 2, FULL], 0).cost(costs) == 100 + 10 + 0 + 40 + 100


def test_speedup_is_relative_to_a_full_call_each_time(costs):
    assert Policy([FULL, 0, 1, 0], 0).speedup(costs) == pytest.approx(400 / 110)


def test_a_depth_beyond_the_model_names_the_number_of_units(costs):
    with pytest.raises(PolicyError, match="depth 3 exceeds the 2 units"):
        Policy([FULL, 3]).cost(costs)
