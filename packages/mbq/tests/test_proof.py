"""The claims of the paper in miniature: on the zoo's vision-language model, and on SmolLM2 where there is no vision."""

from __future__ import annotations

import pared_zoo
import pytest
from mbq.bench import text, vlm
from pared_bench import BenchContext

pytestmark = [pytest.mark.slow, pytest.mark.proof]


def shipped() -> bool:
    try:
        pared_zoo.path("vlm-world")
    except (FileNotFoundError, ValueError):
        return False
    return True


needs_vlm = pytest.mark.skipif(not shipped(), reason="the zoo ships no vlm-world here")


def values(records, metric):
    return {record.variant: record.value for record in records if record.metric == metric}


@needs_vlm
def test_the_loss_depends_less_on_vision_tokens_once_a_model_is_trained(tmp_path):
    records = vlm.sensitivities(BenchContext(out=tmp_path), None, 8)
    medians = values([r for r in records if r.settings["positions"] == "predicting"], "median vision / answer")
    assert medians["trained"] < 0.5


@needs_vlm
def test_searched_scales_lose_less_than_rounding_at_three_bits(tmp_path):
    arms = {name: vlm.SEARCHED[name] for name in ("RTN", "AWQ (mse)", "AWQ (mae)", "MBQ")}
    kl = values(vlm.compare(BenchContext(out=tmp_path), None, "w3", 16, 64, 1, arms=arms), "KL of answers")
    assert all(kl[name] < 0.85 * kl["RTN"] for name in arms if name != "RTN")


@needs_vlm
def test_smoothing_and_search_lose_less_than_rounding_when_activations_have_outliers(tmp_path):
    kl = values(vlm.compare(BenchContext(out=tmp_path), None, "w4a8", 8, 64, 1), "KL of answers")
    assert kl["MBQ"] < kl["RTN"]
    assert kl["SmoothQuant"] < kl["RTN"]


def test_without_vision_mbq_is_awq_with_an_absolute_error_and_beats_rounding(tmp_path):
    records = text.run(BenchContext(out=tmp_path), samples=4, held_out=4)
    assert values(records, "scales equal to AWQ (mae)")["MBQ"] == 1
    found = {(r.variant, r.settings.get("bits")): r.value for r in records if r.metric == "perplexity"}
    assert found["MBQ", "w3"] <= 0.9 * found["RTN", "w3"]
    assert found["AWQ (mae)", "w4"] <= 1.08 * found["full precision", None]
