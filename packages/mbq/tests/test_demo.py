"""The bench's options, and its exam on an untrained model of the zoo's class."""

from __future__ import annotations

import pytest
import torch
from mbq import demo
from mbq.bench import arms, run, world
from mbq.bench.world import Exam, calibration_batches
from pared_bench import BenchContext, DemoContext


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The recipe's model before its first step, in a folder."""
    from pared_zoo.recipes import recipe

    folder = tmp_path_factory.mktemp("vlm")
    # Without the processor, whose classes need torchvision.
    recipe("vlm-world")().build().model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("options", "named"), [({"experiments": "w3,w5"}, "w5"), ({"seeds": 0}, "seeds=0")])
def test_wrong_options_of_the_bench_are_named(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        run(BenchContext(out=tmp_path), **options)


def test_calibration_samples_mark_vision_and_answers(untrained):
    exam = Exam.prepare(untrained, 1, torch.device("cpu"))
    (batch,) = calibration_batches(exam.model, 1, 0)
    assert int(batch["vision_mask"].sum()) == 16 * 16
    asked = batch["labels"] != -100
    assert 1 < int(asked.sum()) < 8
    assert asked[0, -1]
    assert not (asked & batch["vision_mask"]).any()
    assert exam.score(exam.model).kl == 0


@torch.no_grad()
def test_the_exam_asks_as_the_model_answers_by_itself(untrained):
    from pared_zoo.recipes.chat import VIDEO, chat_tokenizer
    from pared_zoo.recipes.turns import Turns
    from pared_zoo.recipes.vlm_world import noisy_pixels, to_pixels
    from pared_zoo.world import sample_clips

    exam = Exam.prepare(untrained, 1, torch.device("cpu"))
    pixels = to_pixels(noisy_pixels(sample_clips(1, world.TEST_SEED, world.FRAMES), world.TEST_SEED))
    tokenizer, batch = chat_tokenizer(), exam.blocks[0][1]
    first = batch["turns"][0] == 1
    video = [tokenizer.convert_tokens_to_ids(VIDEO)] * (16 * world.FRAMES + 1)
    ids = torch.tensor([[*Turns(tokenizer).opening, *video, *batch["ids"][0][first].tolist()]])
    logits = exam.model(input_ids=ids, pixel_values_videos=pixels).logits[0, -int(first.sum()) :]
    torch.testing.assert_close(exam.logits(exam.model, 0)[0][first], logits, rtol=1e-3, atol=1e-4)


def test_two_clips_of_a_sample_stand_behind_each_other_or_around_captions(untrained):
    exam = Exam.prepare(untrained, 0, torch.device("cpu"))
    one, two = calibration_batches(exam.model, 2, 0)
    (pair,) = calibration_batches(exam.model, 2, 0, "pairs")
    assert pair["inputs_embeds"].equal(torch.cat([one["inputs_embeds"], two["inputs_embeds"]], 1))
    assert pair["vision_mask"].sum() == 2 * 16 * 16
    (around,) = calibration_batches(exam.model, 2, 0, "interleaved")
    assert around["labels"].shape[1] == pair["labels"].shape[1] + world.CAPTION_TOKENS
    assert (around["labels"] != -100).sum() == (pair["labels"] != -100).sum() + world.CAPTION_TOKENS
    assert around["vision_mask"].sum() == pair["vision_mask"].sum()


def test_planted_outliers_do_not_change_the_function(untrained):
    exam = Exam.prepare(untrained, 1, torch.device("cpu"))
    planted = exam.with_outliers()
    before, after = (one.model.model.language_model.layers[0].input_layernorm.weight for one in (exam, planted))
    assert after.abs().max() == 20 * before.abs().max()
    assert exam.score(planted.model).kl < 1e-6


@pytest.mark.slow
def test_the_bench_scores_every_arm_and_draws_the_sensitivities(untrained, tmp_path):
    options = {"samples": 2, "clips": 1, "seeds": 1, "model": untrained}
    records = run(BenchContext(out=tmp_path), experiments="sensitivity,w3,w4a8", **options)
    assert (tmp_path / "sensitivity.png").stat().st_size > 0
    kl = {(r.settings["bits"], r.variant): r.value for r in records if r.metric == "KL of answers"}
    assert {name for bits, name in kl if bits == "w3"} == {"full precision", *arms.WEIGHTS}
    assert {name for bits, name in kl if bits == "w4a8"} == {"full precision", *arms.INTEGER}
    assert all(value > 0 for (_, name), value in kl.items() if name != "full precision")


@pytest.mark.slow
def test_the_demo_shows_methods_sizes_answers_and_sensitivities(untrained, tmp_path):
    result = demo.run(DemoContext(out=tmp_path), samples=1, clips=2, model=untrained)
    quality, sizes, answers = result.tables
    assert [row[0] for row in quality.rows] == ["float32", *demo.METHODS]
    assert [row[0] for row in sizes.rows] == ["bfloat16", "W3, packed"]
    assert len(answers.rows) == demo.SHOWN
    assert len(answers.columns) == 2 + 1 + len(demo.METHODS)
    assert len(result.figures) == 1
