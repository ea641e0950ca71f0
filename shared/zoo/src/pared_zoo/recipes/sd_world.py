"""``sd-world``: a complete StableDiffusionPipeline for 64x64 pictures of the world."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pared_zoo.recipes.base import Batch, Recipe, Schedule, Track
from pared_zoo.recipes.latents import encode_scenes
from pared_zoo.recipes.painting import load_pipeline, painted_accuracy
from pared_zoo.recipes.reading import caption_encoder, caption_ids, read_once
from pared_zoo.recipes.tokenizer import world_tokenizer
from pared_zoo.shipped import path
from pared_zoo.world import Scene, SceneDistribution, caption, iter_scenes, sample_scenes

RESOLUTION = 64
MAX_TOKENS = 32
CFG_DROPOUT = 0.1
#: Min-SNR weighting (Hang et al. 2023, eq. 9): steps that are almost clean do not drown the others.
SNR_CLIP = 5.0
#: From this share of the steps on, very noisy latents count as if the error grew with the root of the signal-to-noise
#: ratio only: that is where a sampler decides what stands where, and where the plain loss hardly looks.
LAYOUT_FROM = 0.5
SCENES = SceneDistribution(kinds=(0.25, 0.25, 0.4, 0.1, 0.0), max_objects=2)
HELD_OUT_PROMPTS = 500
HELD_OUT_SEED = 20_000
#: The best of 1.25, 1.5 and 2 by attribute accuracy on scenes that are neither trained on nor held out.
GUIDANCE_SCALE = 2.0
EVALUATION_STEPS = 25
#: Size -> scenes encoded once, channels of the three levels, layers per block, width and depth of the text encoder.
ARCHITECTURE: dict[str, dict[str, Any]] = {
    "small": {"scenes": 40_000, "channels": (32, 64, 96), "layers": 2, "text_width": 96, "text_layers": 2},
    "base": {"scenes": 400_000, "channels": (64, 96, 128), "layers": 2, "text_width": 128, "text_layers": 4},
}


class Denoiser(torch.nn.Module):
    """The two trained parts of the pipeline."""

    def __init__(self, text_encoder: torch.nn.Module, unet: torch.nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        context = self.text_encoder(input_ids)[0]
        return self.unet(noisy, timesteps, context, return_dict=False)[0]


class SdWorld(Recipe):
    """Epsilon prediction on latents of ``vae-world``, caption dropout for guidance.

    The text encoder first learns to read captions, and is then trained along. In the second half of the steps, the
    noise levels that decide the layout count more.
    """

    name = "sd-world"
    _text_state: dict[str, torch.Tensor] | None = None
    schedules: ClassVar = {
        "small": Schedule(steps=11_200, batch_size=48, learning_rate=1.5e-3),
        "base": Schedule(steps=60_000, batch_size=256, learning_rate=6e-4, warmup=500, ema_decay=0.9995),
    }

    def build(self) -> torch.nn.Module:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(self.seed_of(0))
        a = ARCHITECTURE[self.size]
        text_encoder = self._text_encoder()
        unet = UNet2DConditionModel(
            sample_size=RESOLUTION // 4,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=a["channels"],
            layers_per_block=a["layers"],
            cross_attention_dim=a["text_width"],
            # One head of 32 channels and more: narrower ones cost the CPU half as much again.
            attention_head_dim=1,
            norm_num_groups=8,
        )
        if self._text_state is not None:
            text_encoder.load_state_dict(self._text_state)
        return Denoiser(text_encoder, unet.to(memory_format=torch.channels_last))

    def _text_encoder(self) -> torch.nn.Module:
        a = ARCHITECTURE[self.size]
        return caption_encoder(world_tokenizer(MAX_TOKENS), a["text_width"], a["text_layers"])

    def prepare(self, folder: Path, device: torch.device, track: Track) -> None:
        self._tokenizer = world_tokenizer(MAX_TOKENS)
        self._scenes = training_scenes(ARCHITECTURE[self.size]["scenes"], self.seed_of(1))
        self._latents = encode_scenes(
            self._scenes, path("vae-world"), RESOLUTION, folder / "latents.safetensors", device, track
        )
        reader = self._text_encoder()
        seeds = (self.seed_of(5), self.seed_of(6))
        read_once(reader, self._tokenizer, self._scenes, folder / "text_encoder.safetensors", seeds, device, track)
        self._text_state = reader.state_dict()
        self._signal = noise_scheduler().alphas_cumprod

    def batch(self, step: int, rank: int, size: int) -> Batch:
        rng = np.random.default_rng([self.seed_of(2, step, rank)])
        rows = rng.integers(len(self._scenes), size=size)
        ids = caption_ids([self._scenes[row] for row in rows], rng, self._tokenizer, CFG_DROPOUT)
        latents = self._latents[torch.from_numpy(rows)].float()
        layout = torch.tensor(step >= LAYOUT_FROM * self.schedule.steps)
        return {"latents": latents, "input_ids": ids, "layout": layout}

    def loss(self, module: torch.nn.Module, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        latents = batch["latents"].contiguous(memory_format=torch.channels_last)
        count, device = len(latents), latents.device
        # One timestep from each of `count` equal spans: the same distribution as independent draws, less variance.
        spans = torch.arange(count, device=device) + torch.rand(count, device=device, generator=generator)
        timesteps = (spans * (len(self._signal) / count)).long()
        noise = torch.randn(latents.shape, device=device, generator=generator)
        signal = self._signal.to(device)[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        # On a CPU the fused attention takes twice as long to differentiate as plain products of so few tokens.
        attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
        with attention:
            prediction = module(noisy, timesteps, batch["input_ids"])
        error = (prediction - noise).square().mean(dim=(1, 2, 3))
        ratio = (signal / (1 - signal)).flatten()
        weight = ratio.clamp(max=SNR_CLIP) / ratio
        weight = torch.where(batch["layout"], weight * ratio.clamp(max=1.0).rsqrt(), weight)
        return {"loss": (weight * error).mean(), "epsilon": error.mean()}

    def save(self, module: torch.nn.Module, folder: Path) -> None:
        from diffusers import AutoencoderKL, StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(path("vae-world")),
            text_encoder=module.text_encoder,
            tokenizer=world_tokenizer(MAX_TOKENS),
            unet=module.unet,
            scheduler=noise_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(torch.float16).save_pretrained(folder)

    @staticmethod
    def load(folder: Path) -> Any:
        from diffusers import StableDiffusionPipeline

        return load_pipeline(StableDiffusionPipeline, folder)

    def evaluate(self, folder: Path, device: torch.device, track: Track) -> dict[str, float]:
        pipeline = self.load(folder).to(device)

        def paint(prompts: list[str], seed: int) -> np.ndarray:
            latents = torch.randn((len(prompts), 4, 16, 16), generator=torch.Generator().manual_seed(seed))
            images = pipeline(
                prompts,
                latents=latents.to(device),
                num_inference_steps=EVALUATION_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                output_type="np",
            ).images
            return (images * 255).round().astype(np.uint8)

        scenes = held_out_scenes()
        metrics = painted_accuracy(paint, scenes, HELD_OUT_SEED, track)
        return metrics | {"prompts": len(scenes), "steps": EVALUATION_STEPS, "guidance_scale": GUIDANCE_SCALE}


def noise_scheduler() -> Any:
    """The scheduler of Stable Diffusion 1.5: PNDM without Runge-Kutta steps on the scaled linear schedule."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def held_out_scenes(n: int = HELD_OUT_PROMPTS) -> list[Scene]:
    """The first ``n`` scenes of the evaluation stream; for n <= 500 none of their captions is trained on."""
    return sample_scenes(n, HELD_OUT_SEED, SCENES)


def training_scenes(n: int, seed: int) -> list[Scene]:
    """``n`` scenes whose canonical captions are none of the held-out ones."""
    held_out = {caption(s) for s in held_out_scenes()}

    stream = (s for s in iter_scenes(seed, SCENES) if caption(s) not in held_out)
    return [next(stream) for _ in range(n)]
