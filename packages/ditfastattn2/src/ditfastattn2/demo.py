"""What `pared demo ditfastattn2` shows: the same prompts in full and by a plan, the plan itself, what heads look at."""

from __future__ import annotations

from typing import Any

import numpy as np
from pared_bench import DemoContext, DemoResult, Figure, Table

from ditfastattn2.bench import patterns
from ditfastattn2.bench.controls import every_nth, interval_of_density
from ditfastattn2.bench.world import CALIBRATION_PROMPTS, GUIDANCE, STEPS, WIDEST, Judge, Outcome, World
from ditfastattn2.patterns import HeadPattern, local_share
from ditfastattn2.picture import draw
from ditfastattn2.plan import Plan

PROMPTS, FULL_PROMPTS = 12, 64
SHOWN = 8
MAPS = 6
SCALE = 2
"""Enlargement of the pictures in the figure."""


def run(context: DemoContext, *, prompt: str = "", delta: float = 0.6) -> DemoResult:
    """Calibrate, sample held-out prompts in full, by the plan and by plain reuse; with `prompt`, show pictures of it.

    Raises `ConfigError` for a `delta` below 0.
    """
    world = World.load(context.device, context.seed)
    config = world.config(delta, methods=WIDEST)
    context.log(f"calibrating on {CALIBRATION_PROMPTS} prompts")
    plan = world.calibrate(config)
    count = FULL_PROMPTS if context.full else PROMPTS
    scenes = world.scenes[CALIBRATION_PROMPTS : CALIBRATION_PROMPTS + count]
    texts = world.texts(count, CALIBRATION_PROMPTS)
    interval = interval_of_density(plan, plan.kept())
    ways: dict[str, Plan | None] = {
        "full": None,
        "by plan": plan,
        f"all reused, {interval - 1} of {interval} steps": every_nth(plan, interval),
    }
    outcomes = {name: world.sample(texts, way, context, name) for name, way in ways.items()}
    flops = world.denoiser_flops()
    table, metrics = _compare(outcomes, scenes, flops.attention / flops.total)
    if prompt:
        outcomes = {name: world.sample([prompt] * SHOWN, way, context, name) for name, way in ways.items()}
        captions = f'"{prompt}", latents 1 to {SHOWN}'
    else:
        captions = "; ".join(f"{i + 1}: {text}" for i, text in enumerate(texts[:SHOWN]))
    context.log("looking at heads")
    looked = patterns.observe(world, 2)
    figures = [
        Figure.from_plot("The same latents, sampled each way", _gallery(outcomes), captions),
        Figure.from_plot(
            "Which head does what at which step",
            draw(plan),
            f"{plan.num_steps} steps, {len(plan.layers)} layers of {plan.layers[0].heads} heads.",
        ),
        Figure.from_plot(
            "What heads attend to",
            _maps(looked),
            f"Mean attention of some heads, rows ask, columns answer, the picture first, text behind the line. "
            f"{local_share(looked):.0%} of the heads keep 80 % of the picture's attention to itself within 1/8 of it.",
        ),
    ]
    removed = metrics["by_plan.attention_removed"]
    summary = (
        f"The plan removes {removed:.0%} of attention at {metrics['by_plan.psnr']:.1f} dB to the full ones. Reusing "
        f"all attention at some steps, at the same cost, gives {metrics['reuse.psnr']:.1f} dB."
    )
    return DemoResult("DiTFastAttnV2 on a multimodal transformer of the zoo", summary, [table], figures, metrics)


def _compare(outcomes: dict[str, Outcome], scenes: Any, share: float) -> tuple[Table, dict[str, float]]:
    """Return a row for every way; `share` is that of attention in the FLOPs of the denoiser."""
    base = outcomes["full"]
    full_flops = outcomes["by plan"].stats["attention_flops"]["full"] / len(base.images)
    judge = Judge(scenes, base)
    rows: list[tuple[str | None, ...]] = []
    metrics: dict[str, float] = {}
    for (name, outcome), key in zip(outcomes.items(), ("full", "by_plan", "reuse"), strict=True):
        scores = {metric: _mean(score) for metric, score in judge.scores(outcome).items()}
        removed = outcome.stats.get("removed", 0.0)
        rows.append(
            (
                name,
                f"{1e3 * outcome.seconds:.0f} ms",
                f"{base.seconds / outcome.seconds:.2f}x",
                f"{full_flops * (1 - removed) / 1e9:.3g} G",
                f"{removed:.0%}",
                None if name == "full" else f"{scores['psnr']:.1f} dB",
                f"{scores['frechet']:.3f}",
                f"{100 * scores['accuracy']:.1f} %",
            )
        )
        metrics |= {f"{key}.{metric}": value for metric, value in scores.items()}
        metrics |= {f"{key}.attention_removed": removed, f"{key}.speedup": base.seconds / outcome.seconds}
    table = Table(
        f"{len(base.images)} held-out prompts, {STEPS} steps, guidance {GUIDANCE:g}",
        (
            "run",
            "time per image",
            "speed-up",
            "attention FLOPs per image",
            "removed",
            "PSNR to full",
            "Frechet",
            "accuracy",
        ),
        rows,
        f"Time is that of the whole pipeline; attention is {share:.0%} of the FLOPs of its denoiser, and a larger "
        "share with more tokens. Frechet: distance to pictures of the world in EfficientNet features, lower is better. "
        "Accuracy: attributes of the prompt that the detector finds.",
    )
    return table, metrics


def _mean(score: Any) -> float:
    return float(score.mean()) if hasattr(score, "mean") else float(score)


def _gallery(outcomes: dict[str, Outcome]) -> Any:
    from matplotlib.figure import Figure as Plot
    from pared_bench.quality import as_uint8

    rows = [(name, as_uint8(outcome.images[:SHOWN])) for name, outcome in outcomes.items()]
    count, side = rows[0][1].shape[:2]
    plot = Plot(figsize=(SCALE * count * side / 100 + 1.6, SCALE * len(rows) * side / 100), layout="constrained")
    for axes, (name, pictures) in zip(plot.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axes.imshow(np.concatenate(list(pictures), axis=1), interpolation="nearest")
        axes.set_ylabel(name, rotation=0, ha="right", va="center", wrap=True)
        axes.set(xticks=[], yticks=[])
    return plot


def _maps(looked: list[HeadPattern]) -> Any:
    """Draw the coarse attention of heads from the most local to the least."""
    from matplotlib.figure import Figure as Plot

    ordered = sorted(looked, key=lambda one: -sum(one.band))
    shown = [ordered[round(i * (len(ordered) - 1) / (MAPS - 1))] for i in range(min(MAPS, len(ordered)))]
    plot = Plot(figsize=(2.1 * len(shown), 2.6), layout="constrained")
    for axes, one in zip(plot.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.imshow(one.map.sqrt().numpy(), cmap="magma", interpolation="nearest")
        edge = one.vision_share * len(one.map) - 0.5
        axes.axvline(edge, color="white", linewidth=0.6)
        axes.axhline(edge, color="white", linewidth=0.6)
        axes.set_title(f"{one.layer.removeprefix('transformer_blocks.')} head {one.head}\n"
                       f"{sum(one.band) / len(one.band):.0%} near", fontsize=7)  # fmt: skip
        axes.set(xticks=[], yticks=[])
    return plot
