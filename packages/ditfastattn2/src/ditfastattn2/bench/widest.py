"""Reuse and the widest arrow alone, over all deltas, beside reuse of all attention at some steps."""

from __future__ import annotations

from pared_bench import BenchContext, Record

from ditfastattn2.bench import controls
from ditfastattn2.bench.quality import DELTAS, Arm, records_of
from ditfastattn2.bench.world import CALIBRATION_PROMPTS, WIDEST, Judge, World

EXPERIMENT = "widest arrow"
MOST_PROMPTS = 32
INTERVALS = (2, 3, 4)


def run(context: BenchContext, world: World, prompts: int) -> list[Record]:
    """Every arm on the same held-out prompts and latents."""
    count = min(MOST_PROMPTS, prompts)
    texts = world.texts(count, CALIBRATION_PROMPTS)
    base = world.sample(texts, None, context, "without compression")
    judge = Judge(world.scenes[CALIBRATION_PROMPTS : CALIBRATION_PROMPTS + count], base)
    attention = world.denoiser_flops().attention
    plans = {delta: world.calibrate(world.config(delta, methods=WIDEST)) for delta in DELTAS}
    arms = [Arm(f"1/8 and reuse, delta {delta:g}", plan) for delta, plan in plans.items()]
    arms += [Arm(reuse_of(every), controls.every_nth(plans[DELTAS[0]], every)) for every in INTERVALS]
    records = []
    for arm in arms:
        outcome = world.sample(texts, arm.way, context, arm.name)
        records += records_of(arm, outcome, judge, attention, base, experiment=EXPERIMENT)
    return records


def reuse_of(interval: int) -> str:
    """Name of the arm that computes all attention at every `interval`-th step."""
    return f"everything reused at {interval - 1} of {interval} steps"
