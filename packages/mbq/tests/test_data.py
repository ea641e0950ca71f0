"""Calibration data with pictures and clips, read by a real processor, and the command line on them."""

from __future__ import annotations

import json

import mbq
import numpy as np
import pytest
import torch
from mbq.cli import RESULT, app
from mbq.data import load_batches
from mbq.media import frames_of, spaced
from mbq_models import TEXT, spread
from PIL import Image
from typer.testing import CliRunner

SIDE, PATCH, FRAMES = 32, 8, 5


@pytest.fixture(scope="module")
def processor():
    pytest.importorskip("torchvision", reason="the processor's classes need it")
    from pared_zoo.recipes.chat import chat_processor

    return chat_processor(SIDE, (SIDE // PATCH) ** 2)


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    """A tiny model that the processor fits."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tokens = processor.tokenizer
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokens), "max_position_embeddings": 256},
        vision_config={"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": PATCH, **vision},
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        video_token_index=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[SIDE, SIDE]],
    )
    place = tmp_path_factory.mktemp("model")
    spread(LlavaOnevisionForConditionalGeneration(config)).save_pretrained(place)
    processor.save_pretrained(place)
    return place


@pytest.fixture
def data(tmp_path):
    """A picture, an animation and a folder of frames, each with a question."""
    generator = np.random.default_rng(0)
    frames = [Image.fromarray(generator.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(FRAMES)]
    place = tmp_path / "data"
    (place / "clip").mkdir(parents=True)
    frames[0].save(place / "cat.png")
    frames[0].save(place / "walk.gif", save_all=True, append_images=frames[1:])
    for number, frame in enumerate(frames):
        frame.save(place / "clip" / f"{number}.png")
    asked = {"question": "what is the color of the circle", "answer": "red"}
    lines = [{"image": "cat.png", **asked}, {"video": "walk.gif", **asked}, {"video": "clip", **asked}]
    (place / "asked.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return place


def test_pictures_and_clips_become_batches_with_labelled_answers(processor, data):
    picture, animation, clip = load_batches(data, processor, samples=8, length=32, frames=3)
    assert picture["pixel_values"].shape[-1] == SIDE
    assert animation["pixel_values_videos"].shape[:2] == clip["pixel_values_videos"].shape[:2] == (1, 3)
    for batch in (picture, animation, clip):
        said = batch["input_ids"][batch["labels"] != -100]
        assert processor.tokenizer.decode(said) == " red<|im_end|>"


def test_frames_are_evenly_spaced_from_the_first_to_the_last(data):
    assert spaced(9, 3) == [0, 4, 8]
    assert spaced(2, 3) == [0, 1]
    assert spaced(5, 1) == [0]
    found = frames_of(data / "clip", 2)
    ends = [np.asarray(Image.open(data / "clip" / f"{number}.png")) for number in (0, FRAMES - 1)]
    assert np.array_equal(found, np.stack(ends))


def test_a_film_is_read(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=8)
        stream.width = stream.height = SIDE
        for number in range(6):
            picture = np.full((SIDE, SIDE, 3), 40 * number, dtype=np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())
    found = frames_of(tmp_path / "film.mp4", 2)
    assert found.shape == (2, SIDE, SIDE, 3)
    assert abs(int(found[0].mean())) < 15
    assert abs(int(found[1].mean()) - 200) < 15


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"image": "asked.jsonl"}, "asked.jsonl is no picture"),
        ({"image": "../cat.png"}, "cat.png"),
        ({"video": "broken.gif"}, "broken.gif is no animation"),
        ({"video": "broken.mp4"}, "broken.mp4 cannot be read as a film"),
        ({"video": "empty"}, "empty holds none"),
    ],
)
def test_a_picture_or_clip_that_cannot_be_read_is_named(entry, named, data, processor):
    (data / "broken.gif").write_bytes(b"no picture")
    (data / "broken.mp4").write_bytes(b"no film")
    (data / "empty").mkdir()
    (data / "asked.jsonl").write_text(json.dumps({"question": "what", "answer": "red", **entry}))
    with pytest.raises(mbq.CalibrationError, match=named):
        load_batches(data, processor, samples=1, length=32)


def test_the_command_line_balances_the_modalities_of_a_folder_of_clips(folder, data, tmp_path):
    from transformers import AutoProcessor

    out = tmp_path / "packed"
    options = ("--bits", "w3", "--group-size", "32", "--calib", str(data), "--frames", "2", "--dtype", "float32")
    result = CliRunner().invoke(app, ["quantize", str(folder), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    stored = mbq.MBQResult.load(out / RESULT)
    assert all(weight is not None for layer in stored.weights for weight in layer.values())
    assert "import mbq" in (out / "README.md").read_text()
    model = mbq.from_pretrained(out)
    (batch,) = load_batches(data, AutoProcessor.from_pretrained(out), samples=1, length=32)
    with torch.no_grad():
        assert model(**{key: value for key, value in batch.items() if key != "labels"}).logits.isfinite().all()
