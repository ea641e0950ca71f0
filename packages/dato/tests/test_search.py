from __future__ import annotations

import json

import pytest
from dato import FULL, Policy, PolicyError, UnitCosts, hypervolume, search
from pared_hooks import ConfigError

COSTS = UnitCosts(full=100.0, depth=(0.0, 10.0, 40.0), attention=())
WANTED = (FULL, 1, 0, 1, FULL, 1, 0, 0, FULL, 1)


def likeness(policy: Policy) -> float:
    """Quality that is best for one known schedule: minus the number of calls that differ from it."""
    return -float(sum(a != b for a, b in zip(policy.depth, WANTED, strict=True)))


def run(evaluate=likeness, **changes):
    options = {"num_calls": 10, "unit_costs": COSTS, "ratios": (0.0,), "population": 12, "generations": 12}
    return search(evaluate, **{**options, **changes})


def test_the_front_holds_no_policy_that_another_beats():
    front = run().front
    costs = [cost for _, _, cost in front]
    qualities = [quality for _, quality, _ in front]
    assert costs == sorted(costs)
    assert qualities == sorted(qualities)
    assert all(cost == policy.cost(COSTS) and quality == likeness(policy) for policy, quality, cost in front)


def test_evolution_beats_random_search_of_the_same_size():
    reference = (-10.0, 1000.0)
    for seed in range(3):
        evolved = run(seed=seed)
        drawn = run(seed=seed, population=evolved.history[-1].evaluations, generations=1)
        assert hypervolume([point[1:] for point in evolved.front], reference) > 1.02 * hypervolume(
            [point[1:] for point in drawn.front], reference
        )


def test_a_seed_gives_the_same_search_and_another_seed_another():
    assert run(seed=1) == run(seed=1)
    assert run(seed=1).history[0] != run(seed=2).history[0]


def test_no_policy_is_evaluated_twice():
    seen = []
    result = run(evaluate=lambda policy: seen.append(policy) or likeness(policy), ratios=(0.0, 0.4))
    assert len(seen) == len(set(seen)) == result.history[-1].evaluations <= 12 * 12


def test_an_exhausted_space_ends_with_every_policy_known():
    result = run(num_calls=3, evaluate=lambda policy: float(sum(policy.depth)), depths=(0, 1), generations=20)
    assert result.history[-1].evaluations == 4


def test_given_policies_are_in_the_first_generation():
    result = run(init=[Policy(WANTED, 0.0)], generations=1)
    assert max(quality for _, quality, _ in result.front) == 0


def test_given_policies_may_only_use_the_searched_depths():
    with pytest.raises(PolicyError, match="depth 2"):
        run(init=[Policy([FULL, 2], 0.0)])


def test_the_ratio_of_a_skipped_call_is_not_searched():
    result = run(depths=(0,), ratios=(0.0, 0.3), generations=2)
    assert all(policy.ratio[1:] == (0.0,) * 9 for policy, _, _ in result.front)


def test_an_interrupted_search_continues_to_the_same_result(tmp_path):
    calls = 0

    def interrupted(policy):
        nonlocal calls
        calls += 1
        if calls > 30:
            raise KeyboardInterrupt
        return likeness(policy)

    path = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        run(evaluate=interrupted, checkpoint=path)
    remaining = []
    resumed = run(evaluate=lambda policy: remaining.append(policy) or likeness(policy), checkpoint=path)
    assert resumed == run()
    assert len(remaining) == resumed.history[-1].evaluations - 30
    assert [file.name for file in tmp_path.iterdir()] == ["search.json"]


def test_a_finished_search_is_read_from_its_checkpoint(tmp_path):
    path = tmp_path / "search.json"
    finished = run(checkpoint=path)

    def refuse(policy):
        raise AssertionError("evaluated again")

    assert run(evaluate=refuse, checkpoint=path) == finished


def test_the_checkpoint_of_another_search_is_refused(tmp_path):
    path = tmp_path / "search.json"
    run(checkpoint=path, generations=1)
    with pytest.raises(ConfigError, match="belongs to a search"):
        run(checkpoint=path, seed=5)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "search.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not a dato search checkpoint"):
        run(checkpoint=path)


def test_the_callback_sees_every_generation():
    seen = []
    result = run(callback=seen.append, generations=4)
    assert seen == result.history
    assert [generation.index for generation in seen] == [0, 1, 2, 3]


def test_the_cost_may_be_any_function_of_the_policy():
    result = run(unit_costs=lambda policy: float(policy.depth.count(FULL)), generations=2)
    assert all(cost == policy.depth.count(FULL) for policy, _, cost in result.front)


def test_the_best_policy_within_a_budget():
    result = run()
    _, quality, cost = result.front[len(result.front) // 2]
    assert likeness(result.best(cost)) == quality
    with pytest.raises(ValueError, match="cheapest policy found"):
        result.best(result.front[0][2] - 1)


def test_the_result_is_written_as_json():
    result = run(generations=2)
    stored = json.loads(result.to_json())
    assert [Policy.from_dict(entry["policy"]) for entry in stored["front"]] == [policy for policy, _, _ in result.front]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_calls": 0}, "num_calls"),
        ({"population": 2.5}, "population"),
        ({"generations": 0}, "generations"),
        ({"depths": ()}, "depths"),
        ({"depths": (0, -2)}, "depths"),
        ({"depths": (0, 5)}, "depths"),
        ({"ratios": (1.0,)}, "ratios"),
    ],
)
def test_a_wrong_argument_is_named(changes, field):
    with pytest.raises(ConfigError) as caught:
        run(**changes)
    assert caught.value.field == field


def test_a_quality_that_is_not_finite_stops_the_search():
    with pytest.raises(ValueError, match="must be finite"):
        run(evaluate=lambda policy: float("nan"))


def test_hypervolume_is_the_area_above_the_reference():
    assert hypervolume([(1.0, 3.0), (2.0, 1.0)], (0.0, 4.0)) == 2 * 3
    assert hypervolume([(1.0, 1.0), (2.0, 3.0)], (0.0, 4.0)) == 1 * 3 + 1 * 1
    assert hypervolume([(1.0, 5.0)], (0.0, 4.0)) == 0
