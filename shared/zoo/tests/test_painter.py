"""What ``mmdit-world`` trains agrees with what its pipeline runs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from pared_zoo.recipes import mmdit_world
from pared_zoo.recipes.mmdit_world import MAX_TOKENS, SIDE, MmditWorld, blank_text_encoder
from pared_zoo.recipes.painter import NEAR_ROWS
from pared_zoo.recipes.tokenizer import world_tokenizer
from pared_zoo.world import SceneDistribution, sample_scenes

CAPTIONS = ["a large red circle on a gray background", "two small blue rings in front of navy"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    tiny = {"scenes": 8, "layers": 3, "heads": 2, "text_width": 16, "text_layers": 2}
    monkeypatch.setitem(mmdit_world.ARCHITECTURE, "small", tiny)


@pytest.fixture
def recipe():
    return MmditWorld()


@pytest.fixture
def painter(recipe):
    painter = recipe.build()
    # Blocks begin by adding nothing: only moved weights show what they compute.
    for parameter in painter.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return painter


@pytest.fixture
def input_ids():
    tokenizer = world_tokenizer(MAX_TOKENS)
    return tokenizer(CAPTIONS, padding="max_length", return_tensors="pt")["input_ids"]


def pipeline_of(painter, recipe) -> StableDiffusion3Pipeline:
    third, tokenizer_3 = blank_text_encoder(32)
    return StableDiffusion3Pipeline(
        transformer=painter.transformer, scheduler=None, vae=None,
        text_encoder=painter.text_encoder, tokenizer=world_tokenizer(MAX_TOKENS),
        text_encoder_2=painter.text_encoder_2, tokenizer_2=world_tokenizer(MAX_TOKENS),
        text_encoder_3=third, tokenizer_3=tokenizer_3,
    )  # fmt: skip


@pytest.mark.parametrize("blanks", [1, 32, 256])
@torch.no_grad()
def test_one_raised_token_stands_for_all_blank_ones_of_the_pipeline(recipe, painter, input_ids, blanks):
    noisy, timesteps = torch.randn(2, 4, SIDE, SIDE), torch.tensor([250.0, 900.0])
    ours, _, _ = painter(noisy, timesteps, input_ids, torch.full((2,), math.log(blanks)), merged=False)
    pipeline = pipeline_of(painter, recipe)
    context, _, pooled, _ = pipeline.encode_prompt(
        CAPTIONS, None, None, max_sequence_length=blanks, do_classifier_free_guidance=False
    )
    assert context.shape[1] == MAX_TOKENS + blanks
    painter.transformer.set_attn_processor(JointAttnProcessor2_0())
    theirs = painter.transformer(noisy, context, pooled, timesteps).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_their_own_part_merged_tokens_see_what_four_equal_ones_would(painter, input_ids, monkeypatch):
    painter.merged_in.weight.zero_()
    painter.merged_out.weight.zero_()
    painter.merged_out.bias.zero_()
    # Four neighbours are the same token when they show the same and stand at the same place.
    positions = painter.transformer.pos_embed.pos_embed.unflatten(1, (SIDE // 2, 2, SIDE // 2, 2))
    positions[:] = positions.mean(dim=(2, 4), keepdim=True)
    noisy = torch.randn(2, 4, SIDE // 2, SIDE // 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    arguments = noisy, torch.tensor([250.0, 900.0]), input_ids, torch.zeros(2)
    merged, single = (painter(*arguments, merged=merged) for merged in (True, False))
    torch.testing.assert_close(merged[0], single[0], rtol=1e-4, atol=1e-5)
    every_fourth = single[1].unflatten(1, (SIDE, SIDE))[:, ::2, ::2].flatten(1, 2)
    torch.testing.assert_close(merged[1], every_fourth, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_own_part_of_merged_tokens_tells_four_latents_apart(painter, input_ids):
    noisy = torch.zeros(1, 4, SIDE, SIDE)
    noisy[..., 1, 0] = 1.0
    arguments = torch.tensor([250.0]), input_ids[:1], torch.zeros(1)
    velocity = painter(noisy, *arguments, merged=True)[0]
    other = painter(noisy.roll(1, -1), *arguments, merged=True)[0]
    assert not torch.allclose(velocity, other, atol=1e-3)
    painter.merged_out.weight.zero_()
    painter.merged_out.bias.zero_()
    painter.merged_out.bias[4 * 2 + 1] = 1.0
    moved = painter(noisy, *arguments, merged=True)[0]
    painter.merged_out.bias.zero_()
    difference = (moved - painter(noisy, *arguments, merged=True)[0])[0].nonzero()
    assert {tuple(place) for place in (difference % torch.tensor([5, 2, 2])).tolist()} == {(1, 1, 0)}


@torch.no_grad()
def test_half_of_the_heads_of_all_layers_are_told_how_far_they_look(painter, input_ids):
    for block in painter.transformer.transformer_blocks:
        # Heads that see no difference look everywhere alike.
        block.attn.to_q.weight[:32].zero_()
        block.attn.to_q.bias[:32].zero_()
    arguments = torch.randn(2, 4, SIDE, SIDE), torch.tensor([250.0, 900.0]), input_ids, torch.zeros(2)
    for merged, side in ((False, SIDE), (True, SIDE // 2)):
        at = torch.arange(side * side)
        share = ((at[:, None] - at).abs() <= NEAR_ROWS * side).float().mean(1)
        far = painter(*arguments, merged=merged)[2]
        assert float(far) == pytest.approx(float(-share.log().mean()), rel=1e-5)
    assert len(painter.attention.farness) == len(painter.transformer.transformer_blocks)


def test_a_third_text_encoder_makes_zeros_of_any_text():
    encoder, tokenizer = blank_text_encoder(32)
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=40, truncation=True, return_tensors="pt").input_ids
    made = encoder(ids)[0]
    assert made.shape == (2, 40, 32)
    assert made.abs().max() == 0


@pytest.mark.parametrize("merged", [True, False])
def test_every_trained_parameter_gets_a_gradient_and_the_text_encoders_none(recipe, painter, merged):
    ready(recipe)
    batch = recipe.batch(0 if merged else recipe.schedule.steps - 1, 0, 2)
    recipe.loss(painter, batch, torch.Generator().manual_seed(0))["loss"].backward()
    assert [n for n, p in painter.named_parameters() if (p.grad is None) != n.startswith("text_encoder")] == []


def ready(recipe):
    """Give a recipe what ``prepare`` would, without encoding or reading anything."""
    recipe._tokenizer = world_tokenizer(MAX_TOKENS)
    recipe._scenes = sample_scenes(40, 821, SceneDistribution(max_objects=2))
    recipe._alone = torch.tensor([k for k, s in enumerate(recipe._scenes) if len(s.objects) == 1]).numpy()
    recipe._latents = torch.randn(40, 4, SIDE, SIDE).half()


def test_pictures_first_show_one_object_and_tokens_are_merged_until_the_last_part(recipe):
    ready(recipe)
    steps = recipe.schedule.steps
    first, middle, last = (recipe.batch(int(share * steps), 0, 6) for share in (0, 0.5, 0.9))
    assert [int(b["merged"]) for b in (first, middle, last)] == [1, 1, 0]
    assert len(first["latents"]) == len(middle["latents"]) == 6 * mmdit_world.MERGED_PICTURES
    assert len(last["latents"]) == 6
    assert first["looks"].shape[1] == (SIDE // 2) ** 2
    assert last["looks"].shape[1] == SIDE**2
    alone = recipe._latents[recipe._alone].float()
    assert all((alone == one).flatten(1).all(1).any() for one in first["latents"])
    assert not all((alone == one).flatten(1).all(1).any() for one in middle["latents"])
    again = recipe.batch(int(0.5 * steps), 0, 6)
    assert all(torch.equal(middle[name], again[name]) for name in middle)


def test_the_loss_is_that_of_the_straight_way_from_picture_to_noise(recipe):
    ready(recipe)
    batch = recipe.batch(recipe.schedule.steps - 1, 0, 4)
    seen = SimpleNamespace()

    class Knowing(torch.nn.Module):
        """Takes noise and picture apart, as a perfect model would if it knew the picture."""

        def forward(self, noisy, timesteps, input_ids, blank, merged):
            sigma = (timesteps / 1000).view(-1, 1, 1, 1)
            seen.sigma, seen.blank = sigma.flatten(), blank
            noise = (noisy - (1 - sigma) * batch["latents"]) / sigma
            return noise - batch["latents"], torch.zeros(4, SIDE**2, 27), torch.tensor(0.3)

        def merging(self):
            return torch.zeros(())

    terms = recipe.loss(Knowing(), batch, torch.Generator().manual_seed(1))
    assert terms["velocity"] < 1e-6
    extra = mmdit_world.LOOK_WEIGHT * terms["look"].item() + mmdit_world.FAR_WEIGHT * 0.3
    assert terms["loss"] == pytest.approx(extra, rel=1e-4)
    assert torch.equal(seen.sigma.sort().values, seen.sigma)
    assert 0 < seen.sigma.min() < seen.sigma.max() < 1
    assert 0 <= seen.blank.min() <= seen.blank.max() <= math.log(mmdit_world.MAX_BLANKS)
