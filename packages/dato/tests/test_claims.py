from __future__ import annotations

import pytest
from dato.bench.claims import claims
from dato.bench.searching import compare
from pared_bench import Record


def record(experiment, variant, metric, value, unit=""):
    return Record("dato", variant, metric, value, unit, {"experiment": experiment})


def margins(*records):
    return {one.variant: one.value for one in claims(records)}


def test_a_claim_of_a_difference_is_positive_where_it_holds():
    measured = [
        record("quality", f"p: {arm}", "psnr", value, "dB") for arm, value in (("dato", 20.0), ("cache only", 20.4))
    ]
    assert margins(*measured) == {"p: pruning costs less than 1 dB": pytest.approx(0.6)}


def test_a_lower_distance_counts_as_better():
    measured = [record("quality", f"p: {arm}", "frechet", v) for arm, v in (("dato", 0.5), ("DeepCache uniform", 0.4))]
    assert margins(*measured) == {"p: lower Frechet distance than uniform caching": pytest.approx(-0.1)}


def test_the_search_must_win_by_five_percent():
    measured = [record("search", arm, "hypervolume", v) for arm, v in (("search", 208.0), ("random search", 200.0))]
    assert margins(*measured) == {"search: 5 % more hypervolume than random search": pytest.approx(-0.01)}


def test_fronts_are_compared_by_quality_and_cost():
    fronts = {
        "search": [(20.0, 11.0), (30.0, 31.0)],
        "random search": [(20.0, 21.0)],
        "presets": [(20.0, 12.0), (25.0, 20.0)],
    }
    records = compare(fronts, {"experiment": "search"})
    values = {(one.variant, one.metric): one.value for one in records}
    assert values["search", "hypervolume"] == 20 * 40 + 10 * 20
    assert values["random search", "hypervolume"] == 20 * 30
    assert values["search", "presets matched or dominated"] == 1


def test_what_was_not_measured_makes_no_claim():
    assert claims([record("quality", "p: dato", "psnr", 20.0)]) == []
