"""The bench's options, and its exam on an untrained model of the zoo's class."""

from __future__ import annotations

import pytest
import torch
from mbq import demo
from mbq.bench import run
from mbq.bench.world import Exam, calibration_batches, plant_outliers
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


def test_planted_outliers_do_not_change_the_function(untrained):
    exam = Exam.prepare(untrained, 1, torch.device("cpu"))
    largest = exam.model.model.language_model.layers[0].input_layernorm.weight.abs().max()
    plant_outliers(exam.model)
    assert exam.model.model.language_model.layers[0].input_layernorm.weight.abs().max() == 20 * largest
    assert exam.score(exam.model).kl < 1e-6


@pytest.mark.slow
def test_the_demo_shows_methods_sizes_answers_and_sensitivities(untrained, tmp_path):
    result = demo.run(DemoContext(out=tmp_path), samples=1, clips=2, model=untrained)
    quality, sizes, answers = result.tables
    assert [row[0] for row in quality.rows] == ["float32", *demo.METHODS]
    assert [row[0] for row in sizes.rows] == ["bfloat16", "W3, packed"]
    assert len(answers.rows) == demo.SHOWN
    assert len(answers.columns) == 2 + 1 + len(demo.METHODS)
    assert len(result.figures) == 1
