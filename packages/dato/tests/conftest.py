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


@pytest.fixture(scope="session")
def zoo_pipe():
    """The zoo's Stable Diffusion of the procedural world."""
    import pared_zoo

    return pared_zoo.load("sd-world")


@pytest.fixture
def small_unet():
    """Builds a two-level UNet of four units, quick enough for runs of many calls; keywords change its configuration."""
    from diffusers import UNet2DConditionModel

    def make(**changes):
        settings = {
            "sample_size": 16,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            **changes,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return UNet2DConditionModel(**settings).eval()

    return make


@pytest.fixture
def pipeline(small_unet):
    """Builds a tiny pipeline by name with a scheduler, and the arguments of a run; returns `(pipe, run)`."""
    import diffusers

    def scheduler_of(name):
        settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        extra = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
        return getattr(diffusers, name)(**settings, **extra)

    def make(kind="StableDiffusion", scheduler="DDIMScheduler", steps=9, batch=1, **changes):
        if kind == "DiT":
            return make_dit(scheduler, steps)
        parts = {"scheduler": scheduler_of(scheduler), "text_encoder": None, "tokenizer": None}
        changes |= {
            "StableDiffusionXL": {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
            "StableDiffusionInpaint": {"in_channels": 9},
            "LatentConsistencyModel": {"time_cond_proj_dim": 8},
        }.get(kind, {})
        with torch.random.fork_rng():
            torch.manual_seed(1)
            unet = small_unet(**changes)
            vae = diffusers.AutoencoderKL(
                block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1, sample_size=16
            ).eval()
            if kind == "StableDiffusionControlNet":
                parts["controlnet"] = controlnet_of(unet)
            if kind == "StableDiffusionAdapter":
                parts["adapter"] = diffusers.T2IAdapter(3, [8, 16], num_res_blocks=1, downscale_factor=1).eval()
            if kind == "IPAdapter":
                add_ip_adapter(unet)
            image = torch.rand(batch, 3, 16, 16)
            prompt = torch.randn(2, batch, 7, 32)
            latents = torch.randn(batch, 4, 16, 16)

        run = {
            "prompt_embeds": prompt[0],
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(2),
            "output_type": "latent",
        }
        if kind != "LatentConsistencyModel":
            run |= {"negative_prompt_embeds": prompt[1], "guidance_scale": 5.0}
        if kind == "StableDiffusionXL":
            parts |= {"text_encoder_2": None, "tokenizer_2": None}
            run |= {"pooled_prompt_embeds": prompt[0, :, 0], "negative_pooled_prompt_embeds": prompt[1, :, 0]}
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        if kind == "StableDiffusionImg2Img":
            run |= {"image": image, "strength": 0.6}
        else:
            run |= {"latents": latents, "height": 16, "width": 16}
        if kind == "StableDiffusionInpaint":
            run |= {"image": image, "mask_image": (image[:, :1] > 0.5).float(), "strength": 1.0}
        if kind in ("StableDiffusionControlNet", "StableDiffusionAdapter"):
            run["image"] = image
        if kind == "IPAdapter":
            run["ip_adapter_image_embeds"] = [torch.cat([torch.zeros(batch, 1, 12), torch.ones(batch, 1, 12)])]
        name = "StableDiffusion" if kind == "IPAdapter" else kind
        pipe = getattr(diffusers, f"{name}Pipeline")(vae=vae, unet=unet, **parts)
        return quiet(pipe), run

    def controlnet_of(unet):
        controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,)).eval()
        for parameter in controlnet.parameters():
            # The zero convolutions would make a ControlNet of random weights do nothing.
            parameter.data += 0.02 * torch.randn(parameter.shape)
        return controlnet

    def add_ip_adapter(unet):
        weights = {}
        sizes = [m.to_q.in_features for name, m in unet.named_modules() if name.endswith("attn2")]
        names = [name for name in unet.attn_processors if "attn2" in name]
        assert len(sizes) == len(names)
        by_name = {name: dict(unet.named_modules())[name.removesuffix(".processor")].to_q.in_features for name in names}
        for number, name in enumerate(names):
            for key in ("to_k_ip", "to_v_ip"):
                weights[f"{2 * number + 1}.{key}.weight"] = torch.randn(by_name[name], 32)
        projection = {"proj.weight": torch.randn(4 * 32, 12), "proj.bias": torch.zeros(4 * 32)}
        projection |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
        unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}], low_cpu_mem_usage=False)

    def make_dit(scheduler, steps):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            transformer = diffusers.DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=3,
                sample_size=16,
                patch_size=2,
                in_channels=4,
                out_channels=8,
                num_embeds_ada_norm=1000,
            ).eval()
            vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()
        pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler_of(scheduler))
        run = {"class_labels": [3], "num_inference_steps": steps, "generator": torch.Generator().manual_seed(2)}
        return quiet(pipe), {**run, "output_type": "pt"}

    def quiet(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
