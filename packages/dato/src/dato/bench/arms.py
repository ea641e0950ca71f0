"""What is compared: ways to sample the same prompts from the same latents, and what each one gave and took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dato.apply import applied
from dato.bench.controls import random_pruning
from dato.config import DaToConfig
from dato.costs import UnitCosts, unit_costs
from dato.policy import PRESET_CALLS, Policy

STEPS = 50
"""Denoising steps of the unaccelerated run; PNDM makes one call more."""

BATCH = 16
"""Prompts sampled at once."""

Track = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class Arm:
    """One way to sample: a configuration of dato or none, or another solver with fewer steps."""

    name: str
    config: DaToConfig | None = None
    solver: str = "pndm"
    """"pndm" or "dpm++" (DPM-Solver++ 2M)."""
    steps: int = STEPS
    prunes_at_random: bool = False


@dataclass
class Outcome:
    """Images (prompts, 3, height, width) in [0, 1], seconds and denoiser FLOPs per image, calls by action."""

    arm: Arm
    images: Tensor
    seconds: float
    flops: float
    calls: dict[str, int] = field(default_factory=dict)


def sample(
    pipe: Any,
    prompts: Sequence[str],
    arm: Arm,
    *,
    guidance_scale: float,
    seed: int = 0,
    track: Track = lambda items, description: items,
) -> Outcome:
    """Sample `prompts` as `arm` says; prompt i starts from the same latent in every arm.

    Seconds are process time on the CPU, so that other programs do not count, and waited-for wall time on a GPU.
    """
    images, seconds, flops = [], 0.0, 0.0
    calls: dict[str, int] = {}
    latents = initial_latents(pipe, len(prompts), seed)
    with (
        _solver(pipe, arm.solver),
        random_pruning(seed) if arm.prunes_at_random else nullcontext(),
        applied(pipe, arm.config) if arm.config else nullcontext() as handle,
    ):
        for start in track(range(0, len(prompts), BATCH), arm.name):
            batch = list(prompts[start : start + BATCH])
            began = _now(pipe.device)
            result = pipe(
                batch,
                latents=latents[start : start + BATCH].to(pipe.device, pipe.unet.dtype),
                num_inference_steps=arm.steps,
                guidance_scale=guidance_scale,
                output_type="pt",
            )
            seconds += _now(pipe.device) - began
            images.append(result.images.float().cpu())
            if handle is None:
                flops += len(pipe.scheduler.timesteps) * costs_of(pipe, len(batch)).full
        if handle is not None:
            stats = handle.stats()
            flops, calls = stats["flops"]["with_dato"], stats["calls"]
    return Outcome(arm, torch.cat(images), seconds / len(prompts), flops / len(prompts), calls)


def initial_latents(pipe: Any, count: int, seed: int) -> Tensor:
    """Latents (count, channels, height, width) in fp32 on the CPU; row i depends on `seed` and i alone."""
    side = pipe.unet.config.sample_size
    shape = (pipe.unet.config.in_channels, side, side)
    generators = (torch.Generator().manual_seed(100_003 * seed + i) for i in range(count))
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def costs_of(pipe: Any, prompts: int, config: DaToConfig | None = None) -> UnitCosts:
    """FLOPs of the pipeline's denoiser at a guidance batch of `prompts`."""
    side = pipe.unet.config.sample_size
    shape = (2 * prompts, pipe.unet.config.in_channels, side, side)
    return unit_costs(pipe.unet, shape, config, text_tokens=pipe.tokenizer.model_max_length)


def nearest_uniform(costs: UnitCosts, target: float) -> Policy:
    """The schedule of DeepCache (FULL every N calls, depth 1 between) whose cost is nearest to `target` FLOPs."""
    candidates = [Policy.uniform(PRESET_CALLS, interval, ratio=0.0) for interval in range(1, PRESET_CALLS + 1)]
    return min(candidates, key=lambda policy: abs(policy.cost(costs) - target))


def nearest_steps(costs: UnitCosts, target: float, extra_calls: int) -> int:
    """Solver steps whose cost is nearest to `target` FLOPs, for a solver that makes `extra_calls` beyond one a step."""
    return max(2, round(target / costs.full) - extra_calls)


@contextmanager
def _solver(pipe: Any, name: str):  # type: ignore[no-untyped-def]
    from diffusers import DPMSolverMultistepScheduler, PNDMScheduler

    kinds = {"pndm": PNDMScheduler, "dpm++": DPMSolverMultistepScheduler}
    before = pipe.scheduler
    pipe.scheduler = kinds[name].from_config(before.config)
    try:
        yield
    finally:
        pipe.scheduler = before


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def as_uint8(images: Tensor) -> np.ndarray:
    """Images (count, 3, height, width) in [0, 1] to uint8 (count, height, width, 3)."""
    return (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
