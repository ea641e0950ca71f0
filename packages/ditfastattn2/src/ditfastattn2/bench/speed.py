"""One attention layer, and whole denoiser steps with random weights at full size, as ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.measure import peak_memory, time_paired
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ditfastattn2.apply import applied
from ditfastattn2.bench.synthetic import plan_for, windows_for
from ditfastattn2.functional import headwise_arrow_attention, plan_density
from ditfastattn2.plan import Plan

REMOVED = (0.0, 0.25, 0.43, 0.56, 0.68, 0.75, 0.9)
STEPS = 10


@dataclass(frozen=True)
class Shape:
    """One attention layer of a real model."""

    name: str
    num_vision: int
    num_text: int
    heads: int
    head_dim: int
    text_first: bool


SHAPES = (
    Shape("SD3.5-large 1024", 4096, 333, 38, 64, False),
    Shape("SD3.5-large 2048", 16384, 333, 38, 64, False),
    Shape("FLUX 1024", 4096, 512, 24, 128, True),
    Shape("FLUX 1440", 8100, 512, 24, 128, True),
    Shape("FLUX 2048", 16384, 512, 24, 128, True),
    Shape("FLUX 2880", 32400, 512, 24, 128, True),
    Shape("HunyuanVideo 720p 61 frames", 57600, 256, 24, 128, False),
)


def run(context: BenchContext) -> list[Record]:
    """Attention layers on a GPU; steps of a whole denoiser on any device, at a size that suits it."""
    records: list[Record] = []
    if context.device.type == "cuda":
        for shape in context.track(SHAPES, "attention layers"):
            records += attention(shape, context.device)
    for setting in context.track(list(_settings(context)), "denoiser steps"):
        records += steps(setting, context.device, rounds=5 if context.full else 3)
    return records


def attention(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Record]:
    """Seconds by the share removed: ours, FlexAttention, and torch's kernels on everything; the break-even density."""
    size = (1, shape.num_vision + shape.num_text, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, device=device, dtype=dtype) for _ in range(3))
    layout = (shape.num_vision, shape.num_text, shape.text_first)
    points: list[tuple[float, float]] = []
    records: list[Record] = []
    for removed in REMOVED:
        windows = windows_for(
            shape.heads,
            num_vision=shape.num_vision,
            num_text=shape.num_text,
            text_first=shape.text_first,
            removed=removed,
        )
        density = plan_density(windows, *layout, (128, 64))
        ways = _ways(q, k, v, windows, shape)
        timings = time_paired(ways, device=device, rounds=10)
        settings = {"experiment": "attention layer", "shape": shape.name, "density": round(density, 3), "dtype": "bf16"}
        records += timings.records("ditfastattn2", "torch flash", settings)
        samples = {name: sorted(taken)[len(taken) // 2] for name, taken in timings.samples.items()}
        best = min(time for name, time in samples.items() if name.startswith("torch"))
        points.append((density, samples["fused kernel"] / best))
    settings = {"experiment": "attention layer", "shape": shape.name, "dtype": "bf16"}
    records.append(Record("ditfastattn2", "fused kernel", "break_even_density", _break_even(points), "", settings))
    return records


def _ways(q: Tensor, k: Tensor, v: Tensor, windows: list[int], shape: Shape) -> dict[str, Callable[[], object]]:
    query, key, value = (one.transpose(1, 2) for one in (q, k, v))

    def torch_with(backend: SDPBackend) -> Callable[[], object]:
        def attend() -> object:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value)

        return attend

    def ours(backend: str) -> Callable[[], object]:
        return lambda: headwise_arrow_attention(q, k, v, windows, shape.num_text, shape.text_first, backend=backend)

    ways = {
        "torch flash": torch_with(SDPBackend.FLASH_ATTENTION),
        "torch cuDNN": torch_with(SDPBackend.CUDNN_ATTENTION),
        "fused kernel": ours("triton"),
        "FlexAttention": ours("flex"),
    }
    return {name: way for name, way in ways.items() if _runs(way)}


def _runs(way: Callable[[], object]) -> bool:
    """Whether this torch has the kernel for this GPU."""
    try:
        way()
    except RuntimeError:
        return False
    return True


def _break_even(points: list[tuple[float, float]]) -> float | None:
    """Density at which our time equals that of the best dense kernel, by the line between neighbours; None: never."""
    for (high, slow), (low, fast) in pairwise(points):
        if slow > 1 >= fast:
            return low + (high - low) * (1 - fast) / (slow - fast)
    return points[0][0] if points[0][1] <= 1 else None


@dataclass(frozen=True)
class Setting:
    """A denoiser with random weights and the inputs of one call."""

    name: str
    build: Callable[[torch.device], tuple[Any, dict[str, Any]]]
    num_vision: int
    num_text: int
    removed: tuple[float | str, ...]


def _settings(context: BenchContext) -> Iterator[Setting]:
    shares = (0.43, 0.56, 0.68, "arrows", "cached")
    if context.device.type != "cuda":
        yield Setting("SD3 proportions, 1024 tokens", small_sd3, 1024, 77, (0.43, 0.68, "cached"))
        return
    for pixels in (1024, 2048):
        tokens = (pixels // 16) ** 2
        yield Setting(f"FLUX.1-dev {pixels}", _flux(pixels), tokens, 512, shares)
        yield Setting(f"SD3.5-large {pixels}", _sd35_large(pixels), tokens, 333, shares)


def steps(setting: Setting, device: torch.device, *, rounds: int) -> list[Record]:
    """Seconds of `STEPS` denoiser calls by synthetic plans, against torch's own attention; peak memory and caches."""
    model, inputs = setting.build(device)
    plans: dict[str, Plan | None] = {"base": None}
    for removed in setting.removed:
        plan = plan_for(model, num_vision=setting.num_vision, num_text=setting.num_text, steps=STEPS, removed=removed)
        plans[f"{removed:.0%} removed" if isinstance(removed, float) else f"all {removed}"] = plan
    settings = {
        "experiment": "denoiser steps",
        "model": setting.name,
        "weights": "random",
        "steps": STEPS,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    runners = {name: _runner(model, inputs, plan) for name, plan in plans.items()}
    timings = time_paired(runners, device=device, rounds=rounds, warmup=1)
    records = timings.records("ditfastattn2", "base", settings)
    for name, chosen in plans.items():
        if chosen is not None:
            stats = runners[name]()
            records.append(Record("ditfastattn2", name, "attention_removed", stats["removed"], "", settings))
            records.append(Record("ditfastattn2", name, "cache_memory", stats["peak_cache_bytes"], "B", settings))
        if device.type == "cuda":
            peak = peak_memory(runners[name], device)
            records.append(Record("ditfastattn2", name, "peak_memory", peak.bytes, "B", settings))
    return records


def _runner(model: Any, inputs: dict[str, Any], plan: Plan | None) -> Callable[[], dict[str, Any]]:
    timesteps = torch.linspace(1.0, 0.05, STEPS, device=inputs["hidden_states"].device)

    @torch.no_grad()
    def run() -> dict[str, Any]:
        sample = inputs["hidden_states"]
        with applied(model, plan) if plan is not None else nullcontext() as handle:
            for timestep in timesteps:
                call = {**inputs, "hidden_states": sample, "timestep": timestep.expand(len(sample)).to(sample.dtype)}
                sample = sample - 0.1 * model(**call, return_dict=False)[0]
            return handle.stats() if handle is not None else {}

    return run


def small_sd3(device: torch.device) -> tuple[Any, dict[str, Any]]:
    """A transformer with the proportions of Stable Diffusion 3 that two CPU cores can time."""
    from diffusers import SD3Transformer2DModel

    config = {"sample_size": 64, "patch_size": 2, "num_layers": 4, "num_attention_heads": 6, "attention_head_dim": 64}
    wide = {"caption_projection_dim": 384, "joint_attention_dim": 256, "pooled_projection_dim": 128}
    return _sd3(SD3Transformer2DModel, config | wide, 64, 77, device, torch.float32)


def _sd35_large(pixels: int) -> Callable[[torch.device], tuple[Any, dict[str, Any]]]:
    def build(device: torch.device) -> tuple[Any, dict[str, Any]]:
        from diffusers import SD3Transformer2DModel

        config = {"num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64, "patch_size": 2}
        wide = {"caption_projection_dim": 2432, "pos_embed_max_size": 192, "qk_norm": "rms_norm", "sample_size": 128}
        return _sd3(SD3Transformer2DModel, config | wide, pixels // 8, 333, device, torch.bfloat16)

    return build


def _sd3(
    kind: Any, config: dict[str, Any], latent: int, text: int, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    with torch.device(device):
        model = kind(in_channels=16, out_channels=16, **config).to(dtype).eval()
        return model, {
            "hidden_states": torch.randn(2, 16, latent, latent, dtype=dtype),
            "encoder_hidden_states": torch.randn(2, text, model.config.joint_attention_dim, dtype=dtype),
            "pooled_projections": torch.randn(2, model.config.pooled_projection_dim, dtype=dtype),
        }


def _flux(pixels: int) -> Callable[[torch.device], tuple[Any, dict[str, Any]]]:
    def build(device: torch.device) -> tuple[Any, dict[str, Any]]:
        from diffusers import FluxPipeline, FluxTransformer2DModel

        torch.manual_seed(0)
        side, dtype = pixels // 16, torch.bfloat16
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            # Twelve billion parameters would not fit in float32 beside their copies.
            with torch.device(device):
                model = FluxTransformer2DModel(guidance_embeds=True).eval()
        finally:
            torch.set_default_dtype(previous)
        with torch.device(device):
            return model, {
                "hidden_states": torch.randn(1, side * side, 64, dtype=dtype),
                "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=dtype),
                "pooled_projections": torch.randn(1, 768, dtype=dtype),
                "img_ids": FluxPipeline._prepare_latent_image_ids(1, side, side, device, dtype),
                "txt_ids": torch.zeros(512, 3, dtype=dtype),
                "guidance": torch.full((1,), 3.5, dtype=dtype),
            }

    return build
