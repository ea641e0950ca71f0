"""Every trained model in the package is complete and loads through its real class."""

from __future__ import annotations

import csv
import json

import diffusers
import pared_zoo
import pared_zoo.llamagen
import pytest
import torch
import transformers
from pared_zoo.recipes.vae_world import to_model_range
from pared_zoo.shipped import FOLDER, MAX_BYTES
from pared_zoo.world import render, sample_scenes
from safetensors import safe_open

SHIPPED = [name for name in pared_zoo.models() if (FOLDER / name).is_dir()]
every_model = pytest.mark.parametrize("name", SHIPPED)


def real_class(name: str) -> type:
    """The class that the model's own configuration names."""
    folder = pared_zoo.path(name)
    index = folder / "model_index.json"
    config = json.loads((index if index.exists() else folder / "config.json").read_text())
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"], None) or getattr(pared_zoo.llamagen, config["_class_name"])
    return getattr(transformers, config["architectures"][0])


def parts(model) -> list[torch.nn.Module]:
    components = model.components.values() if isinstance(model, diffusers.DiffusionPipeline) else [model]
    return [part for part in components if isinstance(part, torch.nn.Module)]


def test_there_are_no_folders_without_a_recipe_and_no_leftovers():
    assert sorted(p.name for p in FOLDER.iterdir()) == SHIPPED


@every_model
def test_the_real_class_loads_what_load_returns(name):
    direct, ours = real_class(name).from_pretrained(pared_zoo.path(name)), pared_zoo.load(name)
    assert type(direct) is type(ours)
    for a, b in zip(parts(direct), parts(ours), strict=True):
        assert not b.training
        assert {p.dtype for p in a.parameters()} == {p.dtype for p in b.parameters()} == {torch.float32}
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert all(torch.isfinite(p).all() for p in b.parameters())


@every_model
def test_weights_are_half_precision_safetensors_of_at_most_8_mib(name):
    files = list(pared_zoo.path(name).rglob("*.safetensors"))
    assert 0 < sum(file.stat().st_size for file in files) <= MAX_BYTES
    for file in files:
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} <= {"F16", "I64"}  # noqa: SIM118
    assert not [p for p in pared_zoo.path(name).rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".tmp")]


@every_model
def test_facts_numbers_log_plot_and_card_are_there_and_agree(name):
    folder, card = pared_zoo.path(name), pared_zoo.card(name)
    facts = json.loads((folder / "training.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert facts["name"] == name
    assert f"# {name}" in card
    assert f"{facts['parameters']:,} trained parameters" in card
    assert f"{facts['steps']:,} steps" in card
    assert all(f"| {quantity.replace('_', ' ')} |" in card for quantity in metrics)
    with (folder / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == facts["steps"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@every_model
def test_no_file_names_a_folder_of_the_machine_that_trained_it(name):
    texts = [(p, p.read_text()) for p in pared_zoo.path(name).rglob("*") if p.suffix in (".json", ".md")]
    assert [str(p) for p, text in texts if "_name_or_path" in text or str(FOLDER.parent) in text] == []


@pytest.mark.skipif("vae-world" not in SHIPPED, reason="vae-world is not trained here")
def test_vae_world_codes_pictures_of_other_sizes_by_a_factor_of_four():
    vae = pared_zoo.load("vae-world")
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 48, 96)).latent_dist.mean
        assert latents.shape == (1, 4, 12, 24)
        assert vae.decode(latents).sample.shape == (1, 3, 48, 96)


@pytest.mark.skipif("sd-world" not in SHIPPED, reason="sd-world is not trained here")
def test_sd_world_paints_the_same_picture_for_the_same_seed():
    pipe = pared_zoo.load("sd-world")

    def paint(prompt):
        generator = torch.Generator().manual_seed(3)
        return pipe(prompt, num_inference_steps=2, generator=generator, output_type="pt").images

    picture = paint("a large red circle on a gray background")
    assert picture.shape == (1, 3, 64, 64)
    assert torch.equal(picture, paint("a large red circle on a gray background"))
    assert not torch.equal(picture, paint("a small blue square on a navy background"))


@pytest.mark.skipif("mmdit-world" not in SHIPPED, reason="mmdit-world is not trained here")
def test_mmdit_world_paints_from_text_and_image_tokens_in_one_sequence():
    pipe, counts = pared_zoo.load("mmdit-world"), set()

    def count(module, args, kwargs):
        counts.add((kwargs["hidden_states"].shape[1], kwargs["encoder_hidden_states"].shape[1]))

    pipe.transformer.transformer_blocks[0].attn.register_forward_pre_hook(count, with_kwargs=True)

    def paint(prompt):
        generator = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 2, "max_sequence_length": 32, "output_type": "pt"}
        return pipe(prompt, generator=generator, **options).images

    picture = paint("a large red circle on a gray background")
    assert picture.shape == (1, 3, 96, 96)
    assert counts == {(576, 64)}
    assert torch.equal(picture, paint("a large red circle on a gray background"))
    assert not torch.equal(picture, paint("a small blue square on a navy background"))


@pytest.mark.skipif("vq-world" not in SHIPPED, reason="vq-world is not trained here")
def test_vq_world_has_codes_of_length_one_and_gives_pictures_back():
    model, pixels = pared_zoo.load("vq-world"), to_model_range(render(sample_scenes(4, 9), 64))
    norms = model.quantize.embedding.weight.norm(dim=1)
    assert norms.shape == (512,)
    torch.testing.assert_close(norms, torch.ones(512), rtol=0, atol=2e-3)
    tokens = torch.stack(model.encode(pixels, [(64, 64)] * 4).image_tokens)
    assert tokens.shape == (4, 16, 16)
    error = (model.decode(tokens) - pixels).square().mean()
    # 26 dB; pictures that show nothing of the scene stay below 15.
    assert error < 0.01


@pytest.mark.skipif("ar-world" not in SHIPPED, reason="ar-world is not trained here")
def test_ar_world_paints_the_same_picture_for_the_same_seed():
    pipe = pared_zoo.load("ar-world")

    def paint(prompt):
        return pipe(prompt, generator=torch.Generator().manual_seed(3), output_type="pt", return_tokens=True)

    picture, tokens = paint("a large red circle on a gray background")
    assert picture.shape == (1, 3, 64, 64)
    assert tokens.shape == (1, 256)
    assert torch.equal(tokens, paint("a large red circle on a gray background")[1])
    assert not torch.equal(tokens, paint("a small blue square on a navy background")[1])


@pytest.mark.skipif("emu3-world" not in SHIPPED, reason="emu3-world is not trained here")
def test_emu3_world_ends_its_lines_and_its_picture():
    model, processor = (
        pared_zoo.load("emu3-world"),
        transformers.Emu3Processor.from_pretrained(pared_zoo.path("emu3-world")),
    )
    prompt = {"text": ["a large red circle on a gray background"], "return_for_image_generation": True}
    inputs = processor(**prompt, image_area=(16 * 8) ** 2, return_tensors="pt")
    torch.manual_seed(3)
    tokens = model.generate(inputs["input_ids"], max_new_tokens=300)[:, inputs["input_ids"].shape[1] :]
    assert tokens.shape == (1, 16 * 17 + 3)
    assert (tokens[0, 16:272:17] == model.vocabulary_mapping.eol_token_id).all()
    assert tokens[0, -1] == model.generation_config.eos_token_id
    assert model.decode_image_tokens(image_tokens=tokens, height=16, width=16).shape == (1, 3, 64, 64)
