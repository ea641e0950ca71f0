"""What the recipes of the picture tokenizer and of the models that draw its tokens learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pared_zoo.llamagen import draw_tokens, guided
from pared_zoo.recipes import ar_world, emu3_world, reading
from pared_zoo.recipes.ar_world import LOOK_BLOCKS, LOOK_WEIGHT, ArWorld, nats_per_token
from pared_zoo.recipes.codebook import nearest_code
from pared_zoo.recipes.emu3_text import picture_prompt
from pared_zoo.recipes.emu3_world import PICTURE_LENGTH, Emu3World, draw_pictures
from pared_zoo.recipes.latents import tokenize_scenes
from pared_zoo.recipes.painting import painted_accuracy
from pared_zoo.recipes.vae_world import to_model_range, to_pixels
from pared_zoo.recipes.vq_world import VqWorld, decode_directions, encode_directions, encode_pictures, mosaic
from pared_zoo.world import attribute_accuracy, caption, render, sample_scenes
from torch.nn.functional import cross_entropy, normalize

CPU = torch.device("cpu")


def silent(items, description, total=None):
    return items


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """A vq-world that has learnt nothing yet."""
    folder = tmp_path_factory.mktemp("vq")
    recipe = VqWorld()
    recipe.save(recipe.build(), folder)
    return folder


@pytest.fixture
def small(monkeypatch, untrained):
    """Recipes of few scenes and narrow models on an untrained tokenizer."""
    lessons = reading.teach_reading
    for module in (ar_world, emu3_world):
        monkeypatch.setattr(module, "path", lambda name: untrained)
    monkeypatch.setattr(reading, "teach_reading", lambda *a, **k: lessons(*a, **k, steps=2))
    narrow = {"scenes": 30, "width": 32, "layers": 4, "heads": 2, "text_width": 16, "text_layers": 1}
    monkeypatch.setitem(ar_world.ARCHITECTURE, "small", narrow)
    monkeypatch.setitem(emu3_world.ARCHITECTURE, "small", (30, 32, 3, 2, 1, 64))


def without_gradient(module: torch.nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


# The tokenizer


def test_directions_go_the_way_of_the_models_own_encode_and_decode(untrained):
    model, pictures = VqWorld.load(untrained), render(sample_scenes(3, 5), 64)
    tokens = encode_pictures(model, pictures)
    assert tokens.shape == (3, 16, 16)
    directions = encode_directions(model, to_model_range(pictures))
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3, 16, 16))
    # Half precision in the file may move a direction that lies between two codes.
    assert (nearest_code(directions, model.quantize.embedding.weight) == tokens).float().mean() > 0.98
    codes = model.quantize.embedding.weight[tokens]
    torch.testing.assert_close(decode_directions(model, codes), model.decode(tokens), rtol=1e-4, atol=1e-5)


def test_before_there_are_codes_pictures_go_through_unquantised_and_all_weights_take_part():
    recipe = VqWorld()
    module = recipe.build()
    before = module.quantize.embedding.weight.detach().clone()
    batch = recipe.batch(0, 0, 2)
    terms = recipe.loss(module, batch, None)
    terms["loss"].backward()
    expected = decode_directions(module, encode_directions(module, batch["pixels"]))
    torch.testing.assert_close(terms["square"], (expected - batch["pixels"]).square().mean())
    assert torch.equal(module.quantize.embedding.weight, before)
    assert without_gradient(module) == []


def test_the_codebook_is_spread_over_what_the_encoder_gives_alike_in_every_process():
    recipe = VqWorld()
    modules = [recipe.build(), recipe.build()]
    step = recipe._codes_from
    for rank, module in enumerate(modules):
        recipe.loss(module, recipe.batch(step, rank, 2), None)["loss"].backward()
        assert without_gradient(module) == []
    first, second = (m.quantize.embedding.weight.detach() for m in modules)
    assert torch.equal(first, second)
    directions = encode_directions(modules[0], recipe.batch(step + 1, 0, 4)["pixels"])
    even = normalize(torch.randn(512, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    spread, evenly = (1 - (directions @ book.T).amax(dim=-1).mean() for book in (first, even))
    assert 3 * spread < 2 * evenly


def test_codes_that_nothing_uses_move_and_the_others_stay():
    recipe = VqWorld()
    module, step = recipe.build(), recipe._codes_from
    recipe._spread(module, step, everything=True)
    weight = module.quantize.embedding.weight
    with torch.no_grad():
        # Opposite to the mean of all directions: nothing is near.
        weight[7:9] = -normalize(weight.mean(dim=0), dim=0)
    before = weight.detach().clone()
    recipe._spread(module, step + recipe._every, everything=False)
    assert not torch.equal(weight[7:9], before[7:9])
    assert (weight == before).all(dim=1).float().mean() > 0.5


def test_a_mosaic_takes_blocks_of_the_picture_and_of_the_one_before():
    pixels = torch.arange(3.0)[:, None, None, None].expand(3, 2, 64, 64)
    mixed, own = mosaic(pixels, torch.Generator().manual_seed(4))
    assert own.shape == (3, 16, 16)
    for k in range(3):
        shown = own[k].repeat_interleave(4, 0).repeat_interleave(4, 1)
        expected = torch.where(shown, float(k), float((k - 1) % 3))
        assert torch.equal(mixed[k], expected.expand(2, 64, 64))
    blocks = own.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    assert (blocks.all(-1) | ~blocks.any(-1)).all()
    assert 0.3 < own.float().mean() < 0.7


def test_directions_are_pulled_towards_those_of_the_same_patches_elsewhere():
    recipe = VqWorld()
    module, batch = recipe.build(), recipe.batch(3, 0, 4)
    terms = recipe.loss(module, batch, torch.Generator().manual_seed(5))
    directions = encode_directions(module, batch["pixels"])
    mixed, own = mosaic(batch["pixels"], torch.Generator().manual_seed(5))
    found = encode_directions(module, mixed)
    errors = [
        (found[i] - torch.where(own[i][..., None], directions[i], directions[i - 1])).square().mean() for i in range(4)
    ]
    torch.testing.assert_close(terms["local"], torch.stack(errors).mean())
    assert terms["local"] > 0
    terms["loss"].backward()
    assert without_gradient(module) == []


# Tokens and prompts


def test_tokens_are_made_once(untrained, tmp_path, monkeypatch):
    scenes, cache = sample_scenes(4, 8), tmp_path / "tokens.safetensors"
    tokens = tokenize_scenes(scenes, untrained, 64, cache, CPU, silent)
    assert tokens.dtype == torch.int16
    expected = encode_pictures(VqWorld.load(untrained), render(scenes, 64))
    assert torch.equal(tokens.long(), expected.flatten(1))
    monkeypatch.setattr("pared_zoo.recipes.latents.encode_pictures", lambda *a: pytest.fail("made twice"))
    assert torch.equal(tokenize_scenes(scenes, untrained, 64, cache, CPU, silent), tokens)


def test_painted_pictures_are_asked_for_by_canonical_captions_block_by_block():
    scenes, asked = sample_scenes(60, 3), []

    def paint(prompts, seed):
        asked.append((prompts, seed))
        return render(scenes, 64)[seed - 1000 : seed - 1000 + len(prompts)]

    metrics = painted_accuracy(paint, scenes, 1000, silent)
    assert [(len(prompts), seed) for prompts, seed in asked] == [(50, 1000), (10, 1050)]
    assert [p for prompts, _ in asked for p in prompts] == [caption(s) for s in scenes]
    assert metrics["accuracy_mean"] == attribute_accuracy(render(scenes, 64), scenes)["mean"]


# ar-world


def test_ar_world_learns_tokens_behind_captions_and_drops_a_tenth_of_them(small, tmp_path):
    recipe = ArWorld()
    recipe.prepare(tmp_path, CPU, silent)
    batch = recipe.batch(3, 0, 400)
    assert all(torch.equal(value, recipe.batch(3, 0, 400)[name]) for name, value in batch.items())
    assert not torch.equal(batch["tokens"], recipe.batch(3, 1, 400)["tokens"])
    assert 20 <= batch["dropped"].sum() <= 60
    module = recipe.build()
    torch.nn.init.normal_(module.transformer.output.weight, std=0.3)
    few = {name: value[:6] for name, value in batch.items()} | {"dropped": torch.arange(6) % 2 == 0}
    terms = recipe.loss(module, few, None)
    terms["loss"].backward()
    assert without_gradient(module) == []
    rows = []
    for i in range(6):
        words = few["attention_mask"][i].bool()
        states = recipe._text_encoder(few["input_ids"][i : i + 1, words]).last_hidden_state
        # Padded on the left to all places; what stands at padding is hidden.
        condition = torch.nn.functional.pad(states, (0, 0, 32 - states.shape[1], 0))
        mask = torch.arange(32)[None] >= 32 - states.shape[1]
        condition = module.transformer.null_condition(condition) if i % 2 == 0 else condition
        logits = module.transformer(few["tokens"][i : i + 1, :-1], condition, mask)
        rows.append(cross_entropy(logits[0], few["tokens"][i]))
    torch.testing.assert_close(terms["nats"], torch.stack(rows).mean(), rtol=1e-4, atol=1e-5)
    assert terms["loss"] == terms["nats"] + LOOK_WEIGHT * terms["look"]


def test_ar_world_tells_what_the_place_of_the_next_token_shows(small, tmp_path):
    recipe = ArWorld()
    recipe.prepare(tmp_path, CPU, silent)
    module, batch = recipe.build(), recipe.batch(3, 0, 2)
    seen = []
    module.transformer.layers[LOOK_BLOCKS - 1].register_forward_hook(lambda _m, _a, states: seen.append(states))
    condition, mask = torch.randn(2, 32, 16), torch.ones(2, 32, dtype=torch.bool)
    logits, guesses = module(batch["tokens"][:, :-1], condition, mask)
    assert logits.shape[:2] == guesses.shape[:2] == batch["looks"].shape[:2] == (2, 256)
    # The state of the prefix's last place gives token 0, and so on.
    torch.testing.assert_close(guesses, module.look(seen[0][:, 31:]))
    changed = batch["tokens"][:, :-1].clone()
    changed[:, 100] = (changed[:, 100] + 1) % 512
    other = module(changed, condition, mask)[1]
    assert torch.equal(other[:, :101], guesses[:, :101])
    assert not torch.equal(other[:, 101], guesses[:, 101])


def test_ar_world_is_saved_as_a_pipeline_and_measured(small, tmp_path, monkeypatch):
    scenes = sample_scenes(3, 77)
    monkeypatch.setattr(ar_world, "held_out_scenes", lambda: scenes)
    recipe = ArWorld()
    recipe.prepare(tmp_path, CPU, silent)
    recipe.save(recipe.build(), tmp_path / "export")
    metrics = recipe.evaluate(tmp_path / "export", CPU, silent)
    # The output layer begins with zeros: every code is as likely as any other.
    assert metrics["nats_per_token"] == pytest.approx(np.log(512), rel=1e-4)
    assert metrics["prompts"] == 3
    assert 0 <= metrics["accuracy_mean"] <= 1
    pipeline = recipe.load(tmp_path / "export")
    assert nats_per_token(pipeline, scenes) == metrics["nats_per_token"]


# emu3-world


def test_emu3_world_reads_prompts_and_draws_behind_them_whatever_the_padding(small, tmp_path):
    recipe = Emu3World()
    recipe.prepare(tmp_path, CPU, silent)
    module, batch = recipe.build(), recipe.batch(3, 0, 5)
    logits, read = module(batch["input_ids"], batch["prompts"])
    terms = recipe.loss(module, batch, None)
    terms["loss"].backward()
    assert without_gradient(module) == []
    for row, length in enumerate(batch["prompts"].tolist()):
        whole = batch["input_ids"][row : row + 1, : length + PICTURE_LENGTH]
        assert torch.equal(whole[0, length:], batch["pictures"][row])
        alone = module.model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits
        torch.testing.assert_close(logits[row], alone[0, length - 1 : -1], rtol=1e-4, atol=1e-5)
        prompt = module(whole, torch.tensor([length]))[1]
        torch.testing.assert_close(read[row], prompt[0], rtol=1e-4, atol=1e-5)


def test_nothing_is_asked_about_a_caption_that_was_dropped(small, tmp_path):
    recipe = Emu3World()
    recipe.prepare(tmp_path, CPU, silent)
    batch = recipe.batch(3, 0, 200)
    empty = batch["prompts"] == len(recipe._tokenizer(picture_prompt("", 16))["input_ids"])
    assert 5 <= empty.sum() <= 40
    assert (batch["answers"][empty] == emu3_world.IGNORED).all()
    assert (batch["answers"][~empty] != emu3_world.IGNORED).all()


def test_pictures_are_drawn_from_guided_logits_of_prompts_without_padding(small, tmp_path):
    recipe = Emu3World()
    recipe.prepare(tmp_path, CPU, silent)
    recipe.save(recipe.build(), tmp_path / "export")
    model, prompts = recipe.load(tmp_path / "export"), ["two small rings", "a large red circle on a gray background"]
    drawn = draw_pictures(model, recipe._tokenizer, prompts, torch.Generator().manual_seed(1), guidance_scale=3.0)
    assert drawn.shape == (2, PICTURE_LENGTH)
    starts = [recipe._tokenizer(picture_prompt(p, 16), return_tensors="pt")["input_ids"] for p in (*prompts, "", "")]
    generator, seen = torch.Generator().manual_seed(1), drawn[:, :0]
    with torch.no_grad():
        for _ in range(20):
            rows = [torch.cat([s, seen[i % 2 : i % 2 + 1]], dim=1) for i, s in enumerate(starts)]
            logits = torch.cat([model(input_ids=ids).logits[:, -1] for ids in rows])
            seen = torch.cat([seen, draw_tokens(guided(logits, 3.0), generator=generator)[:, None]], dim=1)
    assert torch.equal(drawn[:, :20], seen)


def test_emu3_world_decodes_to_pixels_as_transformers_does(small, tmp_path):
    recipe = Emu3World()
    recipe.prepare(tmp_path, CPU, silent)
    model = recipe.build().model
    pictures = recipe._pictures[:2]
    expected = model.decode_image_tokens(image_tokens=pictures, height=16, width=16)
    codes, right = emu3_world.picture_codes(pictures, 16, recipe._tokenizer)
    assert right.all()
    assert np.array_equal(to_pixels(model.model.vqmodel.decode(codes).detach()), to_pixels(expected))
