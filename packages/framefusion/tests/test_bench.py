"""The bench, the demo and the commands, on a world model that has not been trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from framefusion import film as drawing
from framefusion.bench import answers, budget, observations, run
from framefusion.bench.arms import arms
from framefusion.bench.claims import claim
from framefusion.bench.world import World
from framefusion.config import FrameFusionConfig
from framefusion.film import draw_tokens, grid_shape, paint, read_film, states_of_tokens
from pared_bench import BenchContext, DemoContext


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torchvision")
    from pared_zoo.recipes.vlm_world import VlmWorld

    place = tmp_path_factory.mktemp("vlm-world")
    recipe = VlmWorld("small")
    recipe.save(recipe.build(), place)
    return place


@pytest.fixture(scope="module")
def world(folder):
    return World.load(str(folder), torch.device("cpu"))


def clips(count):
    from pared_zoo.world import camera_noise, render_clips, sample_clips

    frames = camera_noise(render_clips(sample_clips(count, 7, 16), 64), 7)
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 1, 4, 2, 3)))


QUESTIONS = ["what color is the circle?", "what shape is the red object that moves?"]


def test_texts_and_features_made_apart_are_what_the_processor_makes(world):
    film = clips(2)
    videos = [clip.permute(0, 2, 3, 1).numpy() for clip in film]
    messages = [[{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": one}]}] for one in QUESTIONS]
    texts = [world.processor.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in messages]
    options = {"padding": True, "padding_side": "left", "do_sample_frames": False, "do_resize": False}
    expected = world.processor(text=texts, videos=videos, return_tensors="pt", **options)
    inputs = world.prompts(film, QUESTIONS)
    assert inputs.keys() == expected.keys()
    assert all(inputs[name].equal(expected[name]) for name in inputs)
    with torch.no_grad():
        whole = world.model(**inputs).logits
        apart = world.model(**world.texts(QUESTIONS, 16), **world.encoded(world.encode(film))).logits
    torch.testing.assert_close(apart, whole, atol=1e-4, rtol=1e-4)


def test_every_arm_meets_its_cost_on_real_prompts(world):
    inputs, features = world.texts(QUESTIONS, 16), world.encode(clips(2))
    assert world.layout(inputs).patch.amax() == 15
    plain = world.answer(inputs, features, 2)
    for name, arm in arms(FrameFusionConfig(cost=0.3), world.depth, world.layout).items():
        with arm(world.model) as handle:
            world.answer(inputs, features, 2)
            assert handle.stats()["costs"] == pytest.approx([0.3, 0.3], abs=0.02), name
    assert world.answer(inputs, features, 2) == plain


def test_claims_say_whether_they_hold_and_where():
    held, partly, not_held = (claim("a", one, {}) for one in ([0.1, 0.2], [0.3, -0.1], [-0.2, 0.1]))
    assert [one.note for one in (held, partly, not_held)] == [
        "reproduced, in every stream",
        "reproduced, not in every stream",
        "not reproduced",
    ]
    assert partly.value == pytest.approx(0.1)
    assert partly.spread == (-0.1, 0.3)


def test_answers_of_all_methods_become_accuracies_losses_and_claims(world, tmp_path, monkeypatch):
    """One question of each task, as in the whole run; the clips and arms are cut down."""
    monkeypatch.setattr(answers, "REDUCTIONS", (0.7,))
    monkeypatch.setattr(answers, "calibrated", lambda context, world, costs: [FrameFusionConfig(cost=c) for c in costs])
    records = answers.run(BenchContext("cpu", out=tmp_path), world, 1, 1)
    named = {(one.variant, one.metric) for one in records}
    for arm in (*arms(FrameFusionConfig(cost=0.3), 8), "dense"):
        assert (arm, "accuracy") in named
    costs = [one.value for one in records if one.metric == "cost"]
    assert costs == pytest.approx([0.3] * 8, abs=0.02)
    margins = {one.variant for one in records if one.metric == "margin"}
    assert {
        "above random",
        "above fastv",
        "above evs",
        "window worst on needles",
        "within 3 points of dense",
    } <= margins


def test_observations_are_finite_shares(world):
    states = observations.states_of(world, clips(2), "what moves?")
    assert [tuple(one.shape) for one in states] == [(2, 256, 192)] * 9
    means = observations.pair_means(states[0], 16)
    assert means["same place, next frame"] > means["random pairs"]
    assert observations.spearman(torch.arange(9.0), torch.arange(9.0) ** 3) == pytest.approx(1.0)


def test_the_budget_experiment_is_within_the_tolerance():
    for depth in budget.DEPTHS:
        for cost in budget.COSTS:
            assert all(abs(budget.average_cost(depth, cost, seed) - cost) <= 0.02 for seed in range(3))


def test_wrong_experiments_and_counts_are_named(tmp_path):
    context = BenchContext("cpu", out=tmp_path)
    with pytest.raises(ValueError, match="experiments='speeed'"):
        run(context, experiments="speeed")
    with pytest.raises(ValueError, match="questions=0"):
        run(context, questions=0)


def test_the_demo_draws_tokens_and_gives_both_answers(folder, tmp_path, monkeypatch):
    import pared_zoo
    from framefusion import demo

    monkeypatch.setattr(pared_zoo, "path", lambda name: folder)
    result = demo.run(DemoContext("cpu", out=tmp_path))
    assert result.metrics["tokens_ratio"] == pytest.approx(0.3, abs=0.02)
    assert result.metrics["flops_ratio"] < 0.5
    assert len(result.figures) == 1
    assert len(result.tables[0].rows) > 1


def test_a_video_file_of_ones_own(folder, tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    import pared_zoo
    from framefusion import demo
    from framefusion.cli import app
    from typer.testing import CliRunner

    film = tmp_path / "film.mp4"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for shade in range(24):
            picture = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 10 * shade, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert read_film(film, 6).shape == (6, 64, 96, 3)
    monkeypatch.setattr(pared_zoo, "path", lambda name: folder)
    result = demo.run(DemoContext("cpu", out=tmp_path), video=str(film), question="what moves?", frames=8)
    assert result.tables[0].rows[0][0] == "what moves?"
    picture = tmp_path / "tokens.png"
    ran = CliRunner().invoke(app, ["inspect", str(film), "--frames", "8", "--out", str(picture)])
    assert ran.exit_code == 0, ran.output
    assert "stage 0" in ran.output
    assert picture.is_file()
    missing = CliRunner().invoke(app, ["inspect", str(tmp_path / "none.mp4")])
    assert missing.exit_code == 2


def test_drawing_shows_what_is_left():
    kept, groups = torch.tensor([0, 2, 5]), torch.tensor([0, 0, 1, -1, 1, 2])
    states = states_of_tokens(kept, groups, torch.arange(6))
    assert states.tolist() == [2, 1, 2, 0, 1, 2]
    frames = np.full((2, 8, 12, 3), 200, np.uint8)
    painted = paint(frames[0], states.view(2, 3).numpy())
    assert painted.shape == (8, 12, 3)
    assert painted[2, 1].tolist() == [200, 200, 200]
    assert painted[6, 1].max() < 60
    assert painted[2, 5, 0] > painted[2, 5, 1]
    sheet = np.asarray(draw_tokens(frames, states.view(1, 2, 3).expand(2, -1, -1)))
    # Frames without a mark, below them their tokens: dark and red ones.
    height = round(drawing.WIDTH * 8 / 12)
    above, below = (
        sheet[drawing.LABEL + skip : drawing.LABEL + skip + height] for skip in (0, height + drawing.GAP // 2)
    )
    assert above[:, drawing.GAP : drawing.GAP + drawing.WIDTH].min() == 200
    assert below[:, drawing.GAP : drawing.GAP + drawing.WIDTH].min() < 60
    assert grid_shape(12, 96, 64) == (3, 4)
    assert grid_shape(16, 64, 64) == (4, 4)
