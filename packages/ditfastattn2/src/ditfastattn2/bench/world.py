"""The zoo's multimodal transformer of the procedural world: prompts, plans, pictures under them, their scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from pared_bench import BenchContext, DemoContext
from pared_bench.quality import attribute_accuracy, feature_distance, frechet_distance, psnr, ssim
from torch import Tensor

from ditfastattn2.apply import DiTFastAttnV2Handle, applied
from ditfastattn2.calibrate import Calibration, calibrate
from ditfastattn2.config import DiTFastAttnV2Config
from ditfastattn2.plan import Plan

MODEL = "mmdit-world"
STEPS = 20
GUIDANCE = 3.0
TEXT_TOKENS = 32
"""`max_sequence_length` of the pipeline; the tokens of the first two text encoders come on top."""
BATCH = 16
CALIBRATION_PROMPTS = 8
LARGE_HEADS = 24
"""Heads of a layer of Flux and Stable Diffusion 3, for which the paper's deltas are meant."""
BLOCK = (16, 16)
"""Blocks for 576 tokens: about the share of them that 128 are of 4096. In larger ones, 1/16 and 1/32 would be alike."""

WIDEST = ("cached", "arrow:1/8")
"""Methods for so few tokens: narrower arrows would save little more than 1/8 does, and their errors are larger."""

REFERENCE_SEED = 30_000
REFERENCE_PICTURES = 500
FRECHET_STAGE = 3
"""Stage of EfficientNet-Lite0 whose pooled 112 channels the Frechet distance compares."""
PSNR_CEILING = 100.0
"""PSNR in dB of identical images."""

Way = AbstractContextManager[Any]


@dataclass
class Outcome:
    """Images (prompts, 3, height, width) in [0, 1], process seconds per image, and what a handle counted."""

    images: Tensor
    seconds: float
    stats: dict[str, Any] = field(default_factory=dict)


class DenoiserFlops(NamedTuple):
    """FLOPs of one denoiser call for one prompt with guidance: all of them, and those of attention."""

    total: float
    attention: float


class World:
    """The pipeline, its held-out scenes, and what is the same in every experiment."""

    def __init__(self, pipe: Any, seed: int) -> None:
        from pared_zoo.recipes.sd_world import held_out_scenes

        self.pipe = pipe
        self.seed = seed
        # The first ones are for calibration, the others for the comparison.
        self.scenes = held_out_scenes()

    @classmethod
    def load(cls, device: torch.device, seed: int) -> World:
        """Load the model of the zoo."""
        import pared_zoo

        return cls(pared_zoo.load(MODEL).to(device), seed)

    def texts(self, count: int, start: int = 0) -> list[str]:
        """Captions of `count` held-out scenes after the first `start`."""
        from pared_zoo.world import caption

        return [caption(scene) for scene in self.scenes[start : start + count]]

    def options(self) -> dict[str, Any]:
        """Arguments that every call of the pipeline gets."""
        return {"guidance_scale": GUIDANCE, "max_sequence_length": TEXT_TOKENS}

    def config(self, delta: float, **options: Any) -> DiTFastAttnV2Config:
        """The configuration for 576 tokens and few heads.

        A layer's errors sum up to `delta` at most. With fewer heads the same sum would allow each of them more, so it
        is taken as that of a layer with `LARGE_HEADS`.
        """
        scaled = delta * self.pipe.transformer.config.num_attention_heads / LARGE_HEADS
        return DiTFastAttnV2Config(**{"delta": scaled, "block": BLOCK, **options})

    def calibrate(
        self,
        config: DiTFastAttnV2Config,
        texts: Sequence[str] | None = None,
        *,
        steps: int = STEPS,
        kind: type[Calibration] = Calibration,
    ) -> Plan:
        """Make a plan from the first held-out prompts, or from `texts`."""
        return calibrate(
            self.pipe,
            self.texts(CALIBRATION_PROMPTS) if texts is None else texts,
            config,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(1_000 + self.seed),
            kind=kind,
            **self.options(),
        )

    def sample(
        self,
        texts: Sequence[str],
        way: Plan | Way | None,
        context: BenchContext | DemoContext,
        name: str,
        steps: int = STEPS,
    ) -> Outcome:
        """Sample `texts` by a plan, in another way, or plainly; prompt i starts from the same latent in every way."""
        images, seconds = [], 0.0
        latents = self._latents(len(texts))
        entered = applied(self.pipe, way) if isinstance(way, Plan) else way if way is not None else nullcontext()
        with entered as handle:
            for start in context.track(range(0, len(texts), BATCH), name):
                began = _now(self.pipe.device)
                result = self.pipe(
                    list(texts[start : start + BATCH]),
                    latents=latents[start : start + BATCH].to(self.pipe.device, self.pipe.transformer.dtype),
                    num_inference_steps=steps,
                    output_type="pt",
                    **self.options(),
                )
                seconds += _now(self.pipe.device) - began
                images.append(result.images.float().cpu())
            stats = handle.stats() if isinstance(handle, DiTFastAttnV2Handle) else {}
        return Outcome(torch.cat(images), seconds / len(texts), stats)

    def denoiser_flops(self) -> DenoiserFlops:
        """Count the FLOPs of one denoiser call."""
        from pared_bench.measure import flops

        model, config = self.pipe.transformer, self.pipe.transformer.config
        # CLIP's tokens come before those of the third encoder.
        text = self.pipe.tokenizer.model_max_length + TEXT_TOKENS
        sample = torch.zeros(2, config.in_channels, config.sample_size, config.sample_size, dtype=model.dtype)
        call = {
            "hidden_states": sample,
            "encoder_hidden_states": torch.zeros(2, text, config.joint_attention_dim, dtype=model.dtype),
            "pooled_projections": torch.zeros(2, config.pooled_projection_dim, dtype=model.dtype),
            "timestep": torch.full((2,), 500.0, dtype=model.dtype),
        }
        call = {name: value.to(self.pipe.device) for name, value in call.items()}
        with torch.no_grad():
            total = float(flops(lambda: model(**call)).total)
        tokens = (config.sample_size // config.patch_size) ** 2 + text
        width = config.num_attention_heads * config.attention_head_dim
        return DenoiserFlops(total, 4.0 * 2 * config.num_layers * width * tokens**2)

    def _latents(self, count: int) -> Tensor:
        side, channels = self.pipe.transformer.config.sample_size, self.pipe.transformer.config.in_channels
        generators = (torch.Generator().manual_seed(100_003 * self.seed + i) for i in range(count))
        return torch.stack([torch.randn(channels, side, side, generator=one) for one in generators])


class Judge:
    """Scores outcomes against the pictures without compression and against pictures of the world."""

    def __init__(self, scenes: Sequence[Any], base: Outcome) -> None:
        from pared_zoo.recipes.sd_world import SCENES
        from pared_zoo.world import render, sample_scenes

        self._scenes = scenes
        self._base = base
        pictures = render(sample_scenes(REFERENCE_PICTURES, REFERENCE_SEED, SCENES), base.images.shape[-1])
        self._reference = _features(pictures)

    def scores(self, outcome: Outcome) -> dict[str, Tensor | float]:
        """Per image "psnr", "ssim", "feature_distance" to the plain pictures; "frechet", "accuracy" of the set."""
        from pared_bench.quality import as_uint8

        images, plain = outcome.images, self._base.images
        return {
            "psnr": psnr(images, plain).clamp(max=PSNR_CEILING),
            "ssim": ssim(images, plain),
            "feature_distance": feature_distance(images, plain),
            "frechet": frechet_distance(_features(as_uint8(images)), self._reference),
            "accuracy": attribute_accuracy(images, self._scenes)["mean"],
        }


def _features(pictures: Any) -> Tensor:
    from pared_zoo.real import efficientnet_features

    return efficientnet_features(pictures, maps=True)[FRECHET_STAGE].mean(dim=(2, 3))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
