"""A text encoder learns to read captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pared_zoo.recipes import reading
from pared_zoo.recipes.reading import QUESTIONS, answers, read_once, teach_reading
from pared_zoo.recipes.tokenizer import world_tokenizer
from pared_zoo.world import Object, Scene, SceneDistribution, sample_scenes
from pared_zoo.world.attributes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, TEXTURES
from transformers import CLIPTextConfig, CLIPTextModel

RED_RING = Object("ring", "red", "small", "striped", 0.3, 0.3, 0.11)
BLUE_CROSS = Object("cross", "blue", "large", "plain", 0.7, 0.7, 0.19)
WORDS = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES), "texture": TEXTURES}


def read(scene: Scene) -> dict[str, int]:
    return dict(zip(QUESTIONS, answers(scene), strict=True))


def slot(found: dict[str, int], k: int) -> tuple[str, ...]:
    return tuple(words[found[f"{attribute}_{k}"]] for attribute, words in WORDS.items())


@pytest.mark.parametrize(
    ("relation", "first", "second", "arrangement"),
    [
        ("left of", RED_RING, BLUE_CROSS, 1),
        ("right of", BLUE_CROSS, RED_RING, 1),
        ("above", RED_RING, BLUE_CROSS, 2),
        ("below", BLUE_CROSS, RED_RING, 2),
    ],
)
def test_the_left_or_upper_object_of_a_pair_is_first_in_whichever_order_it_is_told(
    relation, first, second, arrangement
):
    found = read(Scene((first, second), "navy", "pair", relation=relation))
    assert slot(found, 0) == RED_RING.words
    assert slot(found, 1) == BLUE_CROSS.words
    assert (found["arrangement"], found["place"], found["objects"]) == (arrangement, 0, 1)
    assert list(BACKGROUNDS)[found["background"]] == "navy"


def test_a_single_object_fills_both_slots_and_nothing_is_said_of_its_place():
    found = read(Scene((RED_RING,), "gray", "single"))
    assert slot(found, 0) == slot(found, 1) == RED_RING.words
    assert (found["arrangement"], found["place"], found["objects"]) == (0, 0, 0)


@pytest.mark.parametrize("place", list(PLACES))
def test_a_placed_object_has_the_place_that_is_told(place):
    found = read(Scene((BLUE_CROSS,), "gray", "placed", place=place))
    assert list(PLACES)[found["place"] - 1] == place
    assert found["place"] > 0


@pytest.mark.parametrize(("number", "answer"), [(2, 1), (3, 2), (4, 2)])
def test_equal_objects_are_counted_up_to_three(number, answer):
    found = read(Scene((RED_RING,) * number, "gray", "count"))
    assert slot(found, 0) == slot(found, 1) == RED_RING.words
    assert (found["arrangement"], found["objects"]) == (0, answer)


def test_every_answer_is_one_of_those_there_are():
    for scene in sample_scenes(300, 701):
        assert all(0 <= found < QUESTIONS[name] for name, found in read(scene).items())


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer(32)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(reading, "BATCH_SIZE", 32)


def encoder(tokenizer) -> CLIPTextModel:
    torch.manual_seed(9)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, projection_dim=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def silent(items, description, total=None):
    return items


def test_reading_gets_better_than_the_most_frequent_answers(tokenizer, small_batches):
    scenes = sample_scenes(200, 702, SceneDistribution(max_objects=2))
    wanted = np.array([answers(scene) for scene in scenes])
    constant = np.mean([np.bincount(column).max() / len(column) for column in wanted.T])
    assert teach_reading(encoder(tokenizer), tokenizer, scenes, 0, silent, steps=100) > constant + 0.1


def test_reading_repeats_for_a_seed_and_leaves_the_random_state_alone(tokenizer, small_batches):
    scenes = sample_scenes(50, 703)
    models = [encoder(tokenizer) for _ in range(3)]
    before = torch.random.get_rng_state()
    shares = [
        teach_reading(model, tokenizer, scenes, seed, silent, steps=4)
        for model, seed in zip(models, (1, 1, 2), strict=True)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert shares[0] == shares[1]
    first, again, other = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_was_taught_once_is_read_from_the_file(tokenizer, small_batches, tmp_path, monkeypatch):
    monkeypatch.setattr(reading.teach_reading, "__defaults__", (3,))
    scenes, cache = sample_scenes(50, 704), tmp_path / "text_encoder.safetensors"
    taught, other, fresh = (encoder(tokenizer) for _ in range(3))
    read_once(taught, tokenizer, scenes, cache, (0, 1), torch.device("cpu"), silent)
    weights = taught.state_dict()
    monkeypatch.setattr(reading, "teach_reading", lambda *a, **k: pytest.fail("taught twice"))
    read_once(other, tokenizer, scenes, cache, (2, 3), torch.device("cpu"), silent)
    assert all(torch.equal(weights[name], value) for name, value in other.state_dict().items())
    assert any(not torch.equal(weights[name], value) for name, value in fresh.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["text_encoder.safetensors"]
