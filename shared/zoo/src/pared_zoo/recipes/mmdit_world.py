"""``mmdit-world``: a complete StableDiffusion3Pipeline for 96x96 pictures of the world, 576 image tokens each."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pared_zoo.recipes.base import Batch, Recipe, Schedule, Track
from pared_zoo.recipes.heads import near_mass
from pared_zoo.recipes.latents import encode_scenes
from pared_zoo.recipes.layout import layouts
from pared_zoo.recipes.painter import Painter
from pared_zoo.recipes.painting import load_pipeline, painted_accuracy
from pared_zoo.recipes.reading import caption_encoder, caption_ids, read_once
from pared_zoo.recipes.sd_world import (
    CFG_DROPOUT,
    HELD_OUT_SEED,
    MAX_TOKENS,
    held_out_scenes,
    training_scenes,
)
from pared_zoo.recipes.sight import look_loss
from pared_zoo.recipes.tokenizer import world_tokenizer
from pared_zoo.shipped import path
from pared_zoo.world import caption

RESOLUTION = 96
#: Latents of one side, each of which is a token.
SIDE = RESOLUTION // 4
#: Until this share of the steps, four tokens are seen as one, and twice as many pictures make a step.
MERGED_UNTIL = 0.7
MERGED_PICTURES = 2
#: Until this share of the steps, pictures show a single object.
ALONE_UNTIL = 0.06
#: Mean and deviation of the logit of the noise level: what stands where is decided where there is hardly anything else.
NOISE_LOGIT = (1.0, 1.4)
#: How much the guesses of what stands where count beside the velocity.
LOOK_WEIGHT = 0.1
#: How much it counts that some heads look far.
FAR_WEIGHT = 0.2
#: Most tokens that the pipeline lets the third text encoder have; all of them are zero.
MAX_BLANKS = 512
#: Resolution-dependent shift of the sampler's noise levels (Esser et al. 2024, eq. 23), as Stable Diffusion 3 has it.
SHIFT = 3.0
GUIDANCE_SCALE = 2.0
EVALUATION_STEPS = 20
#: Tokens of the third text encoder in the measurement; and prompts of a second one, with the pipeline's own number.
BLANKS = 32
DEFAULT_BLANKS_PROMPTS = 100
#: Prompts on which heads are watched; a head looks near when this much of its attention to the image goes to one part
#: in so many around each token.
HEAD_PROMPTS = 8
HEAD_NEAR = 0.8
HEAD_PART = 8
#: Size -> scenes encoded once, layers, heads of 32 channels; width and layers of each text encoder.
ARCHITECTURE: dict[str, dict[str, int]] = {
    "small": {"scenes": 30_000, "layers": 5, "heads": 4, "text_width": 64, "text_layers": 3},
    "base": {"scenes": 400_000, "layers": 12, "heads": 12, "text_width": 128, "text_layers": 4},
}


class MmditWorld(Recipe):
    """Flow matching on latents of ``vae-world``, caption dropout for guidance.

    The text encoders learn to read captions first, and then stay as they are. For most of the steps, the transformer
    sees four neighbouring tokens as one. A linear head, thrown away afterwards, tells from its middle what is where.
    Half of the attention heads of each layer are asked to look near, as many heads of large models do by themselves.
    """

    name = "mmdit-world"
    _text_states: tuple[dict[str, torch.Tensor], ...] = ()
    schedules: ClassVar = {
        "small": Schedule(steps=4500, batch_size=32, learning_rate=1.5e-3, warmup=200, muon_learning_rate=3e-3),
        "base": Schedule(
            steps=60_000,
            batch_size=256,
            learning_rate=5e-4,
            warmup=1000,
            ema_decay=0.9995,
            muon_learning_rate=1e-3,
        ),
    }

    def build(self) -> torch.nn.Module:
        from diffusers import SD3Transformer2DModel

        torch.manual_seed(self.seed_of(0))
        a = ARCHITECTURE[self.size]
        first, second = self._reader(), self._reader()
        for reader, state in zip((first, second), self._text_states, strict=False):
            reader.text_model.load_state_dict(state)
        width = 32 * a["heads"]
        transformer = SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=a["layers"],
            attention_head_dim=32,
            num_attention_heads=a["heads"],
            joint_attention_dim=2 * a["text_width"],
            caption_projection_dim=width,
            pooled_projection_dim=2 * a["text_width"],
            pos_embed_max_size=SIDE,
        )
        _begin_as_identity(transformer)
        return Painter(first, second, transformer)

    def _reader(self) -> Any:
        a = ARCHITECTURE[self.size]
        return caption_encoder(world_tokenizer(MAX_TOKENS), a["text_width"], a["text_layers"], projection=True)

    def muon_parameters(self, module: Any) -> list[torch.nn.Parameter]:
        # What attends and what follows it; modulation, which starts at zero, is left to AdamW.
        blocks = module.transformer.transformer_blocks.named_parameters()
        return [p for name, p in blocks if p.ndim == 2 and ".norm" not in name]

    def prepare(self, folder: Path, device: torch.device, track: Track) -> None:
        self._tokenizer = world_tokenizer(MAX_TOKENS)
        self._scenes = training_scenes(ARCHITECTURE[self.size]["scenes"], self.seed_of(1))
        self._alone = np.flatnonzero([len(scene.objects) == 1 for scene in self._scenes])
        states = []
        for k, name in enumerate(("text_encoder", "text_encoder_2")):
            reader, cache = self._reader().text_model, folder / f"{name}.safetensors"
            seeds = (self.seed_of(5, k), self.seed_of(6, k))
            read_once(reader, self._tokenizer, self._scenes, cache, seeds, device, track)
            states.append(reader.state_dict())
        self._text_states = tuple(states)
        self._latents = encode_scenes(
            self._scenes, path("vae-world"), RESOLUTION, folder / "latents.safetensors", device, track
        )

    def batch(self, step: int, rank: int, size: int) -> Batch:
        rng = np.random.default_rng([self.seed_of(2, step, rank)])
        merged = step < MERGED_UNTIL * self.schedule.steps
        count = size * MERGED_PICTURES if merged else size
        rows = rng.integers(len(self._scenes), size=count)
        if step < ALONE_UNTIL * self.schedule.steps:
            rows = self._alone[rows % len(self._alone)]
        scenes = [self._scenes[row] for row in rows]
        ids = caption_ids(scenes, rng, self._tokenizer, CFG_DROPOUT)
        looks, places = layouts(scenes, SIDE // 2 if merged else SIDE)
        return {
            "latents": self._latents[torch.from_numpy(rows)].float(),
            "input_ids": ids,
            "looks": looks,
            "places": places,
            "merged": torch.tensor(merged),
        }

    def loss(self, module: Any, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        latents, merged = batch["latents"], bool(batch["merged"])
        count, device = len(latents), latents.device
        # One level from each of `count` equal spans: the same distribution as independent draws, less variance.
        spans = torch.arange(count, device=device) + torch.rand(count, device=device, generator=generator)
        mean, deviation = NOISE_LOGIT
        sigmas = torch.sigmoid(mean + deviation * torch.special.ndtri(spans / count))
        noise = torch.randn(latents.shape, device=device, generator=generator)
        level = sigmas.view(-1, 1, 1, 1)
        blank = math.log(MAX_BLANKS) * torch.rand(count, device=device, generator=generator)
        velocity, guesses, far = module(
            (1 - level) * latents + level * noise, 1000 * sigmas, batch["input_ids"], blank, merged
        )
        error = (velocity.float() - (noise - latents)).square().mean()
        look, seen = look_loss(guesses, batch["looks"], batch["places"])
        loss = error + LOOK_WEIGHT * look + FAR_WEIGHT * far
        if not merged:
            loss = loss + module.merging()
        return {"loss": loss, "velocity": error, "look": look, "seen": seen, "far": far}

    def save(self, module: torch.nn.Module, folder: Path) -> None:
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        blank, blank_tokenizer = blank_text_encoder(2 * ARCHITECTURE[self.size]["text_width"])
        vae = AutoencoderKL.from_pretrained(path("vae-world"))
        # The pipeline adds it to every latent and does not take None.
        vae.register_to_config(shift_factor=0.0)
        pipeline = StableDiffusion3Pipeline(
            transformer=module.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=vae,
            text_encoder=module.text_encoder,
            tokenizer=world_tokenizer(MAX_TOKENS),
            text_encoder_2=module.text_encoder_2,
            tokenizer_2=world_tokenizer(MAX_TOKENS),
            text_encoder_3=blank,
            tokenizer_3=blank_tokenizer,
        )
        pipeline.to(torch.float16).save_pretrained(folder)

    @staticmethod
    def load(folder: Path) -> Any:
        from diffusers import StableDiffusion3Pipeline

        return load_pipeline(StableDiffusion3Pipeline, folder)

    def evaluate(self, folder: Path, device: torch.device, track: Track) -> dict[str, float]:
        pipeline, scenes = self.load(folder).to(device), held_out_scenes()
        options = {"num_inference_steps": EVALUATION_STEPS, "guidance_scale": GUIDANCE_SCALE}

        def paint(prompts: list[str], seed: int, **more: int) -> np.ndarray:
            latents = torch.randn((len(prompts), 4, SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
            images = pipeline(prompts, latents=latents.to(device), output_type="np", **options, **more).images
            return (images * 255).round().astype(np.uint8)

        metrics = painted_accuracy(partial(paint, max_sequence_length=BLANKS), scenes, HELD_OUT_SEED, track)
        few = scenes[:DEFAULT_BLANKS_PROMPTS]
        default = painted_accuracy(paint, few, HELD_OUT_SEED, track)
        near = near_mass(
            pipeline,
            [caption(s) for s in scenes[:HEAD_PROMPTS]],
            HEAD_PART,
            max_sequence_length=BLANKS,
            generator=torch.Generator().manual_seed(HELD_OUT_SEED),
            **options,
        )
        return metrics | {
            "prompts": len(scenes),
            "steps": EVALUATION_STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "max_sequence_length": BLANKS,
            "accuracy_mean_at_default_length": default["accuracy_mean"],
            "prompts_at_default_length": len(few),
            "heads": near.numel(),
            "heads_that_look_near": int((near >= HEAD_NEAR).sum()),
        }


def blank_text_encoder(width: int) -> tuple[Any, Any]:
    """A ``T5EncoderModel`` without layers that makes zeros of any text, and its tokenizer.

    They are what the pipeline itself puts in the place of a third text encoder that is None; but a pipeline without one
    can only be loaded by those who say so.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer(extra_ids=0)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, num_layers=0, num_heads=1, d_kv=1, d_ff=1)
    )
    torch.nn.init.zeros_(encoder.shared.weight)
    return encoder.eval(), tokenizer


def _begin_as_identity(transformer: Any) -> None:
    """Start blocks that add nothing and a velocity of zero (Peebles and Xie 2023, section 3.2)."""
    for layer in transformer.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    still = [transformer.norm_out.linear, transformer.proj_out]
    still += [norm.linear for b in transformer.transformer_blocks for norm in (b.norm1, b.norm1_context)]
    for layer in still:
        torch.nn.init.zeros_(layer.weight)
