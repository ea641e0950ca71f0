"""What `pared demo dato` shows: the same prompts and latents without dato, with its cache alone, with dato."""

from __future__ import annotations

from typing import Any

import numpy as np
from pared_bench import DemoContext, DemoResult, Figure, Table

from dato.bench.arms import STEPS, Arm, Outcome, as_uint8, costs_of, nearest_steps, sample
from dato.bench.quality import PRUNING, Judge
from dato.config import DaToConfig
from dato.policy import PRESET_CALLS, Policy

PROMPTS, FULL_PROMPTS = 64, 256
SHOWN = 8
SCALE = 2
"""Enlargement of the pictures in the figure."""


def run(context: DemoContext, *, prompt: str = "", preset: str = "sd15-mild") -> DemoResult:
    """Sample held-out prompts four ways and compare; with `prompt`, show pictures of it.

    Raises `PolicyError` for an unknown `preset`.
    """
    import pared_zoo
    from pared_zoo.recipes.sd_world import GUIDANCE_SCALE, held_out_scenes
    from pared_zoo.world import caption

    policy = Policy.from_preset(preset, PRESET_CALLS)
    pipe = pared_zoo.load("sd-world").to(context.device)
    scenes = held_out_scenes(FULL_PROMPTS if context.full else PROMPTS)
    texts = [caption(scene) for scene in scenes]
    judge = Judge(scenes)

    def outcome_of(arm: Arm, prompts: list[str]) -> Outcome:
        return sample(pipe, prompts, arm, guidance_scale=GUIDANCE_SCALE, seed=context.seed, track=context.track)

    chosen = _arms(pipe, policy)
    outcomes = [outcome_of(arm, texts) for arm in chosen]
    base = outcomes[0]
    scores = [judge.scores(outcome, base) for outcome in outcomes]
    if prompt:
        shown = [outcome_of(arm, [prompt] * SHOWN).images for arm in chosen]
        captions = [f'"{prompt}", latents 1 to {SHOWN}']
    else:
        shown = [outcome.images[:SHOWN] for outcome in outcomes]
        captions = [f"{i + 1}: {text}" for i, text in enumerate(texts[:SHOWN])]

    rows = []
    metrics: dict[str, float] = {}
    for outcome, score in zip(outcomes, scores, strict=True):
        speed, flops = base.seconds / outcome.seconds, base.flops / outcome.flops
        is_base = outcome is base
        rows.append(
            (
                outcome.arm.name,
                f"{1e3 * outcome.seconds:.0f} ms",
                f"{speed:.2f}x",
                f"{outcome.flops / 1e9:.1f} G",
                f"{flops:.2f}x",
                None if is_base else f"{_mean(score['psnr']):.1f} dB",
                f"{_mean(score['frechet']):.3f}",
                f"{100 * _mean(score['accuracy']):.1f} %",
            )
        )
        key = outcome.arm.name.replace(" ", "_")
        metrics |= {
            f"{key}.speedup": speed,
            f"{key}.flops_ratio": flops,
            f"{key}.psnr": _mean(score["psnr"]),
            f"{key}.frechet": _mean(score["frechet"]),
            f"{key}.accuracy": _mean(score["accuracy"]),
        }
    table = Table(
        f"{len(texts)} held-out prompts, {STEPS} PNDM steps, guidance {GUIDANCE_SCALE:g}, policy {preset}",
        ("run", "time per image", "speed-up", "FLOPs per image", "fewer FLOPs", "PSNR to base", "Frechet", "accuracy"),
        rows,
        "Time is that of the whole pipeline, FLOPs are those of the UNet. Frechet: distance to pictures of the world "
        "in EfficientNet features, lower is better. Accuracy: attributes of the prompt that the detector finds.",
    )
    cache, pruned = outcomes[1], outcomes[2]
    summary = (
        f"dato runs the pipeline {base.seconds / pruned.seconds:.1f} times faster with "
        f"{base.flops / pruned.flops:.1f} times fewer UNet FLOPs. The cache alone gives "
        f"{base.flops / cache.flops:.1f} times; the rest is pruning, less the matching it needs."
    )
    rows_shown = [(outcome.arm.name, as_uint8(images)) for outcome, images in zip(outcomes, shown, strict=True)]
    figure = Figure.from_plot("The same latents, sampled each way", _gallery(rows_shown), "; ".join(captions))
    return DemoResult("DaTo on a Stable Diffusion of the zoo", summary, [table], [figure], metrics)


def _arms(pipe: Any, policy: Policy) -> list[Arm]:
    costs = costs_of(pipe, 1, DaToConfig())
    pruned = policy.with_ratio(PRUNING)
    return [
        Arm("base"),
        Arm("cache only", DaToConfig(policy=policy.with_ratio(0.0))),
        Arm("dato", DaToConfig(policy=pruned)),
        Arm("fewer steps", solver="dpm++", steps=nearest_steps(costs, pruned.cost(costs), 0)),
    ]


def _mean(score: Any) -> float:
    return float(score.mean()) if hasattr(score, "mean") else float(score)


def _gallery(rows: list[tuple[str, np.ndarray]]) -> Any:
    from matplotlib.figure import Figure as Plot

    count, side = rows[0][1].shape[:2]
    plot = Plot(figsize=(SCALE * count * side / 100 + 1.2, SCALE * len(rows) * side / 100), layout="constrained")
    for axes, (name, pictures) in zip(plot.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axes.imshow(np.concatenate(list(pictures), axis=1), interpolation="nearest")
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    return plot
