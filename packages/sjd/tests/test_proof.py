"""The claims in miniature on the zoo's trained models: law, passes, quality, time."""

from __future__ import annotations

import pytest
from pared_bench import BenchContext
from sjd.bench import assisted, passes, quality, speed
from sjd.bench.world import Arm, Sampling, World

pytestmark = [pytest.mark.proof, pytest.mark.slow, pytest.mark.timeout(3600)]

IMAGES, PICTURES = 16, 192
JUDGED = (
    quality.PLAIN,
    quality.AGAIN,
    Arm("independent, 8", 8, "independent", "random"),
    Arm("maximal, 16", 16),
    quality.LOSSY,
)


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return BenchContext("cpu", out=tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def world(context):
    try:
        return World.load(context.device, 64)
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def table(world, context):
    return passes.run(context, world, IMAGES, passes.essential())


@pytest.fixture(scope="module")
def deviations(world, context):
    records = quality.run(context, world, PICTURES, JUDGED)
    return {(r.variant, r.metric): r.value for r in records if r.unit == "standard errors"}


def test_the_trained_model_draws_token_for_token_what_plain_sampling_draws_with_its_noise(world):
    world.pipeline.transformer.double()
    try:
        for greedy in (False, True):
            plain, ours = (
                world.draw(Arm(f"{window}", window, "gumbel", verify="match"), 2, 3, Sampling(greedy=greedy))
                for window in (0, 16)
            )
            assert ours.tokens.equal(plain.tokens)
            assert sum(ours.passes) < sum(plain.passes)
    finally:
        world.pipeline.transformer.float()


CERTAIN = "a token of the toy world has a third of a nat, so that anything guesses it: docs/evidence.md"


@pytest.mark.parametrize(
    "claim",
    [
        pytest.param("Jacobi gains at most 15 % at 16", marks=pytest.mark.xfail(reason=CERTAIN, strict=True)),
        "independent takes at most 1/1.7 of the passes at 16",
        "above needs no more passes than random",
        "more guidance needs more passes, 1 to 3",
        "more guidance needs more passes, 3 to 7.5",
        "a lower temperature needs fewer passes",
        "a smaller top-k needs fewer passes",
    ],
)
def test_what_was_expected_of_passes_holds(table, claim):
    assert margins(table, 1.0)[claim] >= 0


@pytest.mark.parametrize(
    "claim",
    [
        "Jacobi gains at most 15 % at 16",
        "independent takes at most 1/1.7 of the passes at 16",
        "independent gains at most 8 % from 16 to 64",
        "maximal takes at most 1/1.4 of the passes of independent at 32",
        "maximal takes fewer passes than independent at each",
    ],
)
def test_tokens_of_as_many_nats_as_large_models_have_are_guessed_as_theirs(table, claim):
    assert margins(table, passes.HEATED)[claim] >= 0


def margins(table, temperature):
    claims = (r for r in table if r.metric == "margin" and r.settings["temperature"] == temperature)
    return {r.variant: r.value for r in claims}


def test_pictures_are_as_good_as_those_of_plain_sampling(deviations):
    for (variant, metric), value in deviations.items():
        if variant != quality.LOSSY.name:
            # Six comparisons: by chance alone one of them passes three standard errors once in sixty times.
            assert abs(value) < 3, (variant, metric)


def test_a_lossy_setting_is_told_apart(deviations):
    assert max(abs(value) for (variant, _), value in deviations.items() if variant == quality.LOSSY.name) > 3


def test_a_picture_takes_less_time_on_this_machine(world, context):
    records = speed.batch_of(context, world, 1, (7, 15), 3)
    best = max(r.value for r in records if r.metric == "speed-up over plain" and r.variant.startswith("maximal"))
    assert best >= 1.3


def test_image_tokens_are_guessed_better_by_the_model_than_by_ngrams(context):
    try:
        task = assisted.emu3_world(context.device)
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(str(error))
    for greedy in (True, False):
        found = assisted.counted(task, greedy, 0)
        assert found["maximal, 15"] < found["n-gram assistance"] <= found["generate"]
