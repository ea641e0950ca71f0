"""The claims of section 10 in miniature, on the zoo's mmdit-world, and what the CPU path saves."""

from __future__ import annotations

import pytest
from ditfastattn2.bench import cpu, patterns, quality, transfer
from ditfastattn2.bench.claims import claims
from ditfastattn2.bench.world import World
from pared_bench import BenchContext

pytestmark = [pytest.mark.proof, pytest.mark.slow, pytest.mark.timeout(3600)]

PROMPTS = 64
CALIBRATION_SECONDS = 120

ALIKE = pytest.mark.xfail(strict=True, reason="steps of mmdit-world are alike, reuse is nearly free; docs/evidence.md")


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return BenchContext("cpu", out=tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def world(context):
    try:
        return World.load(context.device, context.seed)
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def heads(world, context):
    """Margins of the claims about the trained heads."""
    return margins(patterns.run(context, world))


@pytest.fixture(scope="module")
def records(world, context):
    return quality.run(context, world, PROMPTS)


@pytest.fixture(scope="module")
def scores(records):
    """Margins of the claims about plans and what else could be done at their cost."""
    return margins(records)


def margins(records):
    return {record.variant: record.value for record in claims(records)}


@pytest.mark.parametrize(
    "claim",
    ["a quarter of the heads look near", "how near a head looks differs more between heads than between prompts"],
)
def test_heads_are_as_the_method_needs_them(heads, claim):
    assert heads[claim] >= 0


@pytest.mark.parametrize(
    "claim",
    [
        "heads are 1 dB closer than whole layers",
        "heads are closer than one window for all",
        pytest.param("heads are closer than reusing all attention at some steps", marks=ALIKE),
        "heads are closer than Pyramid Attention Broadcast",
        pytest.param("heads are closer than fewer steps", marks=ALIKE),
        "heads are 3 dB closer than random heads of the same methods",
    ],
)
def test_a_method_for_each_head_keeps_pictures_closer_at_equal_cost(scores, claim):
    assert scores[claim] >= 0


def test_reuse_removes_more_than_arrows_alone_at_the_same_distance(scores):
    assert scores["reuse removes 1.3 times more at the distance of arrows alone"] >= 0


def test_windows_need_whole_text_stripes(scores):
    found = [scores[f"windows without text stripes lose {loss}"] for loss in ("3 dB", "10 points of accuracy")]
    assert max(found) >= 0


@pytest.mark.parametrize("claim", ["distance grows with delta", "what is removed grows with delta"])
def test_delta_trades_distance_for_attention(scores, claim):
    assert scores[f"{claim} (rank correlation)"] >= 0


def test_a_plan_serves_prompts_that_it_was_not_made_from(world, context):
    found = margins(transfer.run(context, world, PROMPTS))
    assert found["a plan of other prompts is within 0.5 dB"] >= 0


def test_a_plan_is_made_in_two_minutes(records):
    seconds = [record.value for record in records if record.metric == "calibration_seconds"]
    assert len(seconds) == len(quality.DELTAS)
    assert max(seconds) <= CALIBRATION_SECONDS


def test_the_cpu_path_is_twice_as_fast_as_full_attention_where_a_third_is_left(monkeypatch, context):
    monkeypatch.setattr(cpu, "REMOVED", (0.7,))
    records = cpu.run(context)
    (speedup,) = (one.value for one in records if one.metric == "speed-up over torch")
    assert records[0].settings["density"] == pytest.approx(0.3, abs=0.03)
    assert speedup >= 2
