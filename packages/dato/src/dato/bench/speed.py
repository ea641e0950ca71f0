"""Section 11: time of one run of denoiser calls at full size with random weights, as a ratio within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import peak_memory, time_paired

from dato.adapters.example_inputs import example_inputs
from dato.adapters.known_configs import KNOWN_CONFIGS
from dato.apply import apply
from dato.bench.quality import PRUNING
from dato.config import DaToConfig
from dato.costs import TEXT_TOKENS, unit_costs
from dato.policy import PRESET_CALLS, Policy

PRESET = "sd15-coco"

#: A UNet with the proportions of SD 1.5 that two CPU cores can time.
CPU_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 32,
    "block_out_channels": (64, 128, 256, 256),
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 128,
}


@dataclass(frozen=True)
class Setting:
    """One model at one size; `guided` samples, the guidance batch included."""

    model: str
    config: dict[str, Any]
    latent: int
    guided: int
    dtype: torch.dtype
    max_downsample: int = 1

    def describe(self) -> dict[str, Any]:
        """The setting as JSON values."""
        return {
            "experiment": "speed",
            "model": self.model,
            "weights": "random",
            "pixels": 8 * self.latent,
            "guidance_batch": self.guided,
            "dtype": str(self.dtype).removeprefix("torch."),
            "calls": PRESET_CALLS,
        }


def run(context: BenchContext) -> list[Record]:
    """Runs of the denoiser under the policies, without text encoder, scheduler and autoencoder."""
    records: list[Record] = []
    for setting in context.track(list(_settings(context)), "speed"):
        records += measure(setting, context.device, _variants(setting), rounds=5 if context.full else 3)
    return records


def _settings(context: BenchContext) -> Iterator[Setting]:
    if context.device.type != "cuda":
        yield Setting("sd15-proportions", CPU_CONFIG, 32, 2, torch.float32)
        return
    for model, pixels, downsample in (("sd15", 512, 1), ("sd21", 768, 1), ("sdxl", 1024, 2), ("sd15", 1024, 1)):
        for images in (1, 8):
            yield Setting(model, KNOWN_CONFIGS[model], pixels // 8, 2 * images, torch.float16, downsample)


def _variants(setting: Setting) -> dict[str, DaToConfig | None]:
    policy = Policy.from_preset(PRESET)
    options = DaToConfig(max_downsample=setting.max_downsample)
    pruning_alone = Policy.uniform(PRESET_CALLS, 1, ratio=0.5)
    variants: dict[str, DaToConfig | None] = {
        "base": None,
        f"{PRESET}: cache only": options.replace(policy=policy.with_ratio(0.0)),
        f"{PRESET}: dato": options.replace(policy=policy.with_ratio(PRUNING)),
        f"{PRESET}: dato, match reused 4 times": options.replace(policy=policy.with_ratio(PRUNING), reuse_match=4),
        "pruning alone": options.replace(policy=pruning_alone),
    }
    for interval in (2, 3, 5, 10):
        uniform = Policy.uniform(PRESET_CALLS, interval, ratio=0.0)
        variants[f"DeepCache uniform {interval}"] = options.replace(policy=uniform)
    return variants


def measure(
    setting: Setting, device: torch.device, variants: dict[str, DaToConfig | None], *, rounds: int
) -> list[Record]:
    """Seconds of a whole run per variant in interleaved rounds, predicted FLOP ratios, and peak memory."""
    unet = _random_unet(setting, device)
    inputs = _random_inputs(unet, setting, device)
    costs = unit_costs(unet, tuple(inputs["sample"].shape), DaToConfig(max_downsample=setting.max_downsample))
    timings = time_paired(
        {name: _runner(unet, inputs, config) for name, config in variants.items()},
        device=device,
        rounds=rounds,
        warmup=1,
    )
    records = timings.records("dato", "base", setting.describe())
    for name, config in variants.items():
        if config is None:
            continue
        assert isinstance(config.policy, Policy)
        records.append(Record("dato", name, "flops_ratio", config.policy.speedup(costs), "x", setting.describe()))
        if device.type == "cuda":
            peak = peak_memory(_runner(unet, inputs, config), device)
            records.append(Record("dato", name, "peak_memory", peak.bytes, "B", setting.describe()))
    return records


def _random_unet(setting: Setting, device: torch.device) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel.from_config(setting.config).to(setting.dtype).eval()


def _random_inputs(unet: Any, setting: Setting, device: torch.device) -> dict[str, Any]:
    shape = (setting.guided, unet.config.in_channels, setting.latent, setting.latent)
    generator = torch.Generator(device).manual_seed(0)

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, device=device).to(setting.dtype)

    inputs: dict[str, Any] = {}
    for name, value in example_inputs(unet, shape, TEXT_TOKENS).items():
        inputs[name] = {key: filled(one) for key, one in value.items()} if isinstance(value, dict) else filled(value)
    return inputs


def _runner(unet: Any, inputs: dict[str, Any], config: DaToConfig | None) -> Callable[[], None]:
    """A function that makes all calls of one run, each on another sample, under `config`."""
    timesteps = torch.linspace(999, 1, PRESET_CALLS, device=inputs["sample"].device)
    others = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}

    @torch.no_grad()
    def run() -> None:
        with ExitStack() as stack:
            if config is not None:
                stack.enter_context(apply(unet, config))
            sample = inputs["sample"]
            for timestep in timesteps:
                prediction = unet(sample, timestep, return_dict=False, **others)[0]
                sample = sample - 0.02 * prediction

    return run
