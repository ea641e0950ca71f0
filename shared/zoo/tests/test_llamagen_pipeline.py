"""The LlamaGen pipeline: prompts in, pictures out, saved and loaded like any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pared_zoo.llamagen import LlamaGenPipeline, LlamaGenTransformer
from pared_zoo.recipes.reading import caption_encoder
from pared_zoo.recipes.tokenizer import world_tokenizer
from transformers import Emu3VQVAE, Emu3VQVAEConfig

PROMPTS = ["a large red circle on a gray background", "two small rings on a navy background"]


def build(condition: str = "caption", caption_length: int = 4) -> LlamaGenPipeline:
    torch.manual_seed(3)
    transformer = LlamaGenTransformer(
        vocab_size=24, hidden_size=32, num_layers=2, num_attention_heads=2, grid_size=4, multiple_of=16, num_classes=5,
        condition=condition, caption_channels=16, caption_length=caption_length, initializer_range=0.2,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.output.weight, std=0.2)
    vqmodel = Emu3VQVAE(
        Emu3VQVAEConfig(
            codebook_size=24, embed_dim=4, latent_channels=4, temporal_downsample_factor=1, base_channels=32,
            channel_multiplier=[1, 1], num_res_blocks=1, attn_resolutions=[], hidden_size=32,
        )
    )  # fmt: skip
    parts = {}
    if condition == "caption":
        tokenizer = world_tokenizer(32)
        parts = {"text_encoder": caption_encoder(tokenizer, 16, 1).eval(), "tokenizer": tokenizer}
    return LlamaGenPipeline(transformer=transformer.eval(), vqmodel=vqmodel, **parts)


@pytest.fixture(scope="module")
def pipe():
    return build()


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_features_are_the_ends_of_the_captions(pipe):
    features, mask = pipe.encode_prompt(PROMPTS)
    assert features.shape == (2, 4, 16)
    assert mask.all()
    for row, prompt in enumerate(PROMPTS):
        ids = pipe.tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = pipe.text_encoder(ids).last_hidden_state[0, -4:]
        torch.testing.assert_close(features[row], expected, rtol=1e-4, atol=1e-5)


def test_short_captions_are_padded_on_the_left():
    features, mask = build(caption_length=6).encode_prompt(["red", ""])
    # A caption's words stand between a start and an end.
    assert mask.sum(dim=1).tolist() == [3, 2]
    assert mask[:, -2:].all()
    assert not features[~mask].any()


def test_pictures_depend_on_seed_and_prompt_alone(pipe):
    first = pipe(PROMPTS, generator=seeded(), output_type="np").images
    assert first.shape == (2, 8, 8, 3)
    assert first.min() >= 0
    assert first.max() <= 1
    assert np.array_equal(pipe(PROMPTS, generator=seeded(), output_type="np").images, first)
    assert not np.array_equal(pipe(PROMPTS, generator=seeded(2), output_type="np").images, first)


def test_tokens_are_those_of_the_transformer_and_pictures_those_of_the_decoder(pipe):
    pictures, tokens = pipe(
        PROMPTS, guidance_scale=2.5, top_k=7, generator=seeded(), output_type="pt", return_tokens=True
    )
    condition, _ = pipe.encode_prompt(PROMPTS)
    expected = pipe.transformer.generate(condition, guidance_scale=2.5, top_k=7, generator=seeded())
    assert torch.equal(tokens, expected)
    decoded = pipe.vqmodel.decode(tokens.view(2, 4, 4)).detach()
    torch.testing.assert_close(pictures, (decoded / 2 + 0.5).clamp(0, 1))


def test_padding_of_captions_is_hidden_from_the_transformer(monkeypatch):
    pipe, seen = build(caption_length=6), []
    whole = pipe.transformer.generate
    monkeypatch.setattr(pipe.transformer, "generate", lambda c, m=None, **k: (seen.append(m), whole(c, m, **k))[1])
    pipe(["red", PROMPTS[0]], generator=seeded(), output_type="pt")
    assert seen[0].sum(dim=1).tolist() == [3, 6]


def test_classes_need_no_text_encoder(tmp_path):
    pipe = build("class")
    pictures = pipe(class_labels=[0, 4], generator=seeded(), output_type="pt").images
    assert pictures.shape == (2, 3, 8, 8)
    pipe.save_pretrained(tmp_path)
    loaded = LlamaGenPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded(class_labels=[0, 4], generator=seeded(), output_type="pt").images, pictures)


def test_a_saved_pipeline_draws_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = LlamaGenPipeline.from_pretrained(tmp_path)
    expected = pipe(PROMPTS, generator=seeded(), output_type="np").images
    assert np.array_equal(loaded(PROMPTS, generator=seeded(), output_type="np").images, expected)
    assert loaded.transformer.config["grid_size"] == 4


def test_one_prompt_gives_one_pil_picture(pipe):
    (picture,) = pipe(PROMPTS[0], generator=seeded()).images
    assert picture.size == (8, 8)


def test_wrong_arguments_name_what_is_valid(pipe):
    with pytest.raises(ValueError, match="takes prompt and no class_labels"):
        pipe(class_labels=[1])
    with pytest.raises(ValueError, match="takes class_labels and no prompt"):
        build("class")("red")
    with pytest.raises(ValueError, match="output_type='jpeg' must be one of"):
        pipe("red", output_type="jpeg")
    with pytest.raises(ValueError, match="top_p=2"):
        pipe("red", top_p=2)
