"""Reuse and the widest arrow alone, over all deltas, beside reuse of all attention at some steps."""

from __future__ import annotations

from collections.abc import Iterator

from pared_bench import BenchContext, Record

from ditfastattn2.bench import controls
from ditfastattn2.bench.quality import DELTAS, Arm, compare
from ditfastattn2.bench.world import WIDEST, World

EXPERIMENT = "widest arrow"
MOST_PROMPTS = 32
INTERVALS = (2, 3, 4)


def run(context: BenchContext, world: World, prompts: int) -> list[Record]:
    """Every arm on the same held-out prompts and latents."""
    return compare(context, world, min(MOST_PROMPTS, prompts), lambda _: _arms(world), EXPERIMENT)


def _arms(world: World) -> Iterator[Arm]:
    plans = {delta: world.calibrate(world.config(delta, methods=WIDEST)) for delta in DELTAS}
    for delta, plan in plans.items():
        yield Arm(f"1/8 and reuse, delta {delta:g}", plan)
    for interval in INTERVALS:
        yield Arm(reuse_of(interval), controls.every_nth(plans[DELTAS[0]], interval))


def reuse_of(interval: int) -> str:
    """Name of the arm that computes all attention at every `interval`-th step."""
    return f"everything reused at {interval - 1} of {interval} steps"
