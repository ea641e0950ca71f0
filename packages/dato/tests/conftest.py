"""Fixtures of the dato tests: fresh generators and tiny denoisers of the real classes."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def rng() -> torch.Generator:
    """A generator that starts at the same seed in every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def calls(rng):
    """Inputs `(sample, timestep, encoder_hidden_states)` of `count` denoiser calls of one run."""

    def make(count: int, size: tuple[int, int] = (16, 16), batch: int = 2, width: int = 32):
        text = torch.randn(batch, 7, width, generator=rng)
        samples = [torch.randn(batch, 4, *size, generator=rng) for _ in range(count)]
        return [(sample, 900 - 10 * index, text) for index, sample in enumerate(samples)]

    return make


@pytest.fixture
def sd_unet():
    """A tiny UNet with the twelve units of SD1.5 and SD2.1."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=16,
            layers_per_block=2,
            block_out_channels=(16, 16, 32, 32),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        ).eval()


@pytest.fixture
def xl_unet():
    """A tiny UNet with the nine units of SDXL."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 1, 2],
            use_linear_projection=True,
            attention_head_dim=[2, 4, 4],
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=32,
            norm_num_groups=8,
        ).eval()


@pytest.fixture
def dit():
    """A tiny class-conditional DiT of four blocks, 8 x 8 patches."""
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=4,
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ).eval()
