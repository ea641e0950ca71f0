"""Latents of scenes are encoded once."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from pared_zoo.recipes.latents import encode_scenes
from pared_zoo.recipes.vae_world import to_model_range, to_pixels
from pared_zoo.world import render, sample_scenes

CPU = torch.device("cpu")
SCENES = sample_scenes(5, 801)


def silent(items, description, total=None):
    return items


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(4)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, scaling_factor=0.5,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_latents_are_scaled_means_of_the_posterior(vae, tmp_path):
    latents = encode_scenes(SCENES, vae, 16, tmp_path / "latents.safetensors", CPU, silent)
    assert latents.dtype == torch.float16
    assert latents.shape == (5, 3, 8, 8)
    model = AutoencoderKL.from_pretrained(vae)
    expected = 0.5 * model.encode(to_model_range(render(SCENES, 16))).latent_dist.mean
    torch.testing.assert_close(latents.float(), expected.detach(), rtol=1e-3, atol=1e-3)


def test_a_second_call_reads_the_file(vae, tmp_path, monkeypatch):
    cache = tmp_path / "latents.safetensors"
    latents = encode_scenes(SCENES, vae, 16, cache, CPU, silent)
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *a, **k: pytest.fail("encoded twice"))
    assert torch.equal(encode_scenes(SCENES, vae, 16, cache, CPU, silent), latents)


def test_another_number_of_scenes_is_encoded_anew(vae, tmp_path):
    cache = tmp_path / "latents.safetensors"
    latents = encode_scenes(SCENES, vae, 16, cache, CPU, silent)
    fewer = encode_scenes(SCENES[:2], vae, 16, cache, CPU, silent)
    torch.testing.assert_close(fewer, latents[:2], rtol=1e-3, atol=1e-3)
    assert len(encode_scenes(SCENES[:2], vae, 16, cache, CPU, silent)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latents.safetensors", "vae"]


def test_other_weights_or_scenes_are_encoded_anew(vae, tmp_path):
    cache = tmp_path / "latents.safetensors"
    latents = encode_scenes(SCENES, vae, 16, cache, CPU, silent)
    assert not torch.equal(encode_scenes(sample_scenes(5, 802), vae, 16, cache, CPU, silent), latents)
    model = AutoencoderKL.from_pretrained(vae)
    torch.nn.init.zeros_(model.quant_conv.weight)
    model.save_pretrained(vae)
    assert not torch.equal(encode_scenes(SCENES, vae, 16, cache, CPU, silent), latents)


def test_pixels_survive_the_way_to_the_model_and_back():
    pixels = render(SCENES, 32)
    assert (to_pixels(to_model_range(pixels)) == pixels).all()
