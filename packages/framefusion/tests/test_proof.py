"""The claims in miniature, on the zoo's vlm-world (section 10)."""

from __future__ import annotations

import pytest
import torch
from framefusion.bench import answers, observations
from framefusion.bench.arms import FASTV, OURS, WINDOW, arms
from framefusion.bench.world import CALIBRATION_SEED, World
from pared_bench import BenchContext

pytestmark = [pytest.mark.proof, pytest.mark.slow, pytest.mark.timeout(3600)]

QUESTIONS, REDUCTION = 20, 0.7


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("torchvision")
    try:
        return World.load("", torch.device("cpu"), torch.bfloat16)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def outcomes(world, tmp_path_factory):
    """Answers of every method at 70 % fewer tokens, and of the dense model."""
    context = BenchContext("cpu", out=tmp_path_factory.mktemp("out"))
    blocks = list(answers.exam_blocks(world, QUESTIONS, 0))
    (config,) = answers.calibrated(context, world, [1 - REDUCTION])
    found = {}
    for name, arm in {answers.DENSE: None, **arms(config, world.depth, world.layout)}.items():
        answers.ask(world, blocks, arm, found.setdefault(name, answers.Outcome()))
    return found


def accuracy(outcomes, name, task=None):
    return outcomes[name].means(task)[0]


@pytest.mark.xfail(strict=True, reason="events and counts are lost on vlm-world; docs/evidence.md")
def test_framefusion_loses_less_than_three_percent(outcomes):
    assert 1 - accuracy(outcomes, OURS) / accuracy(outcomes, answers.DENSE) < answers.CLAIMED_LOSS


EQUAL = pytest.mark.xfail(strict=True, reason="merging before the first layer meets the budget; docs/evidence.md")


@pytest.mark.parametrize(
    "other",
    [
        pytest.param("similarity alone", marks=EQUAL),
        pytest.param("evs", marks=EQUAL),
        "importance alone",
        "random",
        "uniform frames",
        FASTV,
        WINDOW,
    ],
)
def test_framefusion_answers_better_than(other, outcomes):
    assert accuracy(outcomes, OURS) > accuracy(outcomes, other)


def test_needles_are_found_more_often_than_by_fastv(outcomes):
    assert accuracy(outcomes, OURS, answers.NEEDLE) >= accuracy(outcomes, FASTV, answers.NEEDLE) + 0.05


def test_every_method_spends_what_it_was_given(outcomes):
    for name, outcome in outcomes.items():
        assert all(abs(cost - (1 - REDUCTION)) <= 0.02 for cost in outcome.costs), name


@pytest.fixture(scope="module")
@torch.no_grad()
def states(world):
    """Hidden states of every layer at the tokens of clips, in float32."""
    from pared_zoo.recipes.exam import exam, exam_pixels

    sheets = exam(1, CALIBRATION_SEED + 1, 16)
    exact = World.load("", torch.device("cpu"))
    return observations.states_of(exact, exam_pixels(sheets, CALIBRATION_SEED + 1), "what moves?")


def test_tokens_at_one_place_of_neighbouring_frames_are_the_most_alike(world, states):
    means = observations.pair_means(states[0], world.frame_tokens)
    assert means["same place, next frame"] > means["next place, same frame"] + 0.1
    assert means["next place, same frame"] > means["random pairs"]


@pytest.mark.xfail(strict=True, reason="early layers of vlm-world work out how things move; docs/evidence.md")
def test_similarities_keep_their_rank_from_layer_to_layer(world, states):
    similar = [observations.similarities(one, world.frame_tokens).flatten() for one in states[:5]]
    assert all(observations.spearman(similar[0], one) >= 0.6 for one in similar[1:])
