"""Section 10 in miniature: how far pictures move from the uncompressed ones of the same noise, at equal cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pared_bench import BenchContext, Record
from pared_bench.quality import bootstrap
from torch import Tensor

from ditfastattn2.bench import controls
from ditfastattn2.bench.world import (
    CALIBRATION_PROMPTS,
    GUIDANCE,
    MODEL,
    STEPS,
    WIDEST,
    DenoiserFlops,
    Judge,
    Outcome,
    Way,
    World,
)
from ditfastattn2.plan import Plan

DELTAS = (0.05, 0.1, 0.2, 0.6, 1.0, 2.0)
"""For as many heads as large models have (`World.config`)."""
BASIS = 0.5
"""Share of attention removed at which everything else is compared, with the plan that comes nearest to it."""
ARROWS_ALONE = "arrows alone"
METHODS = {
    ARROWS_ALONE: ("arrow:1/8", "arrow:1/16", "arrow:1/32"),
    "reuse alone": ("cached",),
    "with 1/8 alone": WIDEST,
    "with shared guidance": ("cached", "cached_cfg", "arrow:1/8", "arrow:1/16", "arrow:1/32"),
    "with residuals": ("cached", "arrow:1/8+residual", "arrow:1/16+residual", "arrow:1/32+residual"),
}
UNITS = {"psnr": "dB", "ssim": "", "feature_distance": "", "frechet": "", "accuracy": ""}


@dataclass(frozen=True)
class Arm:
    """One way to sample: a plan, a context that changes the pipeline, or plainly, perhaps with fewer steps."""

    name: str
    way: Plan | Way | None = None
    steps: int | None = None
    """None: as many as without compression."""
    removed: float | None = None
    """Share of attention removed where no plan tells it."""
    extra: dict[str, float] = field(default_factory=dict)


def run(context: BenchContext, world: World, prompts: int) -> list[Record]:
    """Every arm on the same held-out prompts and latents."""
    return compare(context, world, prompts, lambda flops: arms(context, world, flops))


def compare(
    context: BenchContext,
    world: World,
    prompts: int,
    arms_of: Callable[[DenoiserFlops], Iterable[Arm]],
    experiment: str = "quality",
) -> list[Record]:
    """Pictures of each arm beside those without compression, of the same held-out prompts and latents."""
    scenes = world.scenes[CALIBRATION_PROMPTS : CALIBRATION_PROMPTS + prompts]
    texts = world.texts(prompts, CALIBRATION_PROMPTS)
    base = world.sample(texts, None, context, "without compression")
    judge = Judge(scenes, base)
    flops = world.denoiser_flops()
    records = records_of(Arm("base", removed=0.0), base, judge, flops.attention, base, experiment)
    for arm in arms_of(flops):
        outcome = world.sample(texts, arm.way, context, arm.name, arm.steps or STEPS)
        records += records_of(arm, outcome, judge, flops.attention, base, experiment)
    return records


def arms(context: BenchContext, world: World, flops: DenoiserFlops) -> Iterator[Arm]:
    """Plans of every delta, then the other ways at the cost of the plan that removes about `BASIS`."""
    plans: dict[float, Plan] = {}
    for delta in DELTAS:
        began = time.process_time()
        plans[delta] = world.calibrate(world.config(delta))
        yield Arm(f"delta {delta:g}", plans[delta], extra={"calibration_seconds": time.process_time() - began})
    delta = min(plans, key=lambda one: abs(1 - plans[one].kept() - BASIS))
    plan = plans[delta]
    kept = plan.kept()
    for name, methods in METHODS.items():
        yield Arm(f"delta {delta:g}, {name}", world.calibrate(world.config(delta, methods=methods)))
    context.log(f"other ways to remove {1 - kept:.0%} of attention")
    yield Arm("whole layers", layer_wise(world, kept))
    window = controls.window_of_density(plan, kept)
    same = controls.uniform(plan, window)
    yield Arm(f"one window {window[0]}/{window[1]} for all", same)
    yield Arm(f"one window {window[0]}/{window[1]}, no text stripes", controls.pure_window(world.pipe, same))
    interval = controls.interval_of_density(plan, kept)
    yield Arm(f"all reused, {interval - 1} of {interval} steps (FORA)", controls.every_nth(plan, interval))
    yield from _broadcast(world, interval)
    yield Arm("same methods, random heads", controls.shuffled(plan, world.seed))
    fewer = min(STEPS - 1, max(2, round(STEPS * (1 - (1 - kept) * flops.attention / flops.total))))
    yield Arm(f"{fewer} steps of {STEPS}", steps=fewer, removed=1 - fewer / STEPS)


def layer_wise(world: World, kept: float, rounds: int = 5) -> Plan:
    """Return a plan of whole layers that keeps about `kept` of attention: its delta is found by halving."""
    low, high = -3.0, 7.0
    best: Plan | None = None
    for _ in range(rounds):
        middle = (low + high) / 2
        plan = world.calibrate(world.config(2.0**middle), kind=controls.LayerWise)
        if best is None or abs(plan.kept() - kept) < abs(best.kept() - kept):
            best = plan
        low, high = (middle, high) if plan.kept() > kept else (low, middle)
    assert best is not None
    return best


def _broadcast(world: World, interval: int) -> Iterator[Arm]:
    """Pyramid Attention Broadcast of diffusers; what it removes is counted on one prompt."""
    interval = max(2, interval)
    flops = []
    for way in (None, controls.broadcast(world.pipe, interval)):
        counter = controls.AttentionCounter()
        with counter:
            _sample_one(world, way)
        flops.append(counter.flops)
    removed = 1 - flops[1] / flops[0]
    yield Arm(f"PAB of diffusers, range {interval}", controls.broadcast(world.pipe, interval), removed=removed)


def _sample_one(world: World, way: Any) -> None:
    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    with way or nothing():
        generator = torch.Generator().manual_seed(0)
        world.pipe(
            world.texts(1), generator=generator, num_inference_steps=STEPS, output_type="latent", **world.options()
        )


def records_of(
    arm: Arm, outcome: Outcome, judge: Judge, attention: float, base: Outcome, experiment: str
) -> list[Record]:
    """Scores with bootstrapped 95 % intervals, attention removed and computed, and seconds of one arm, by image.

    `attention` are the FLOPs of all attention in one denoiser call for one prompt.
    """
    count = len(outcome.images)
    settings = {"experiment": experiment, "model": MODEL, "prompts": count, "steps": STEPS, "guidance": GUIDANCE}
    records = []

    def add(metric: str, value: float, unit: str = "", spread: tuple[float, float] | None = None) -> None:
        records.append(Record("ditfastattn2", arm.name, metric, value, unit, settings, spread, samples=count))

    for metric, score in judge.scores(outcome).items():
        if isinstance(score, Tensor):
            interval = bootstrap(lambda values: float(torch.as_tensor(values).mean()), score.tolist())
            add(metric, float(score.mean()), UNITS[metric], (interval.low, interval.high))
        else:
            add(metric, float(score), UNITS[metric])
    removed = outcome.stats.get("removed", arm.removed)
    if removed is not None:
        add("attention_removed", removed)
        add("attention_flops", STEPS * attention * (1 - removed), "FLOP")
    add("seconds", outcome.seconds, "s")
    add("speedup", base.seconds / outcome.seconds, "x")
    for metric, value in arm.extra.items():
        add(metric, value, "s")
    return records
