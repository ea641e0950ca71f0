"""Does a plan from a few prompts serve others as well as a plan made from those others?"""

from __future__ import annotations

from pared_bench import BenchContext, Record
from pared_bench.quality import psnr

from ditfastattn2.bench.world import BATCH, CALIBRATION_PROMPTS, MODEL, PSNR_CEILING, STEPS, World

DELTA = 0.6


def run(context: BenchContext, world: World, prompts: int) -> list[Record]:
    """PSNR to the uncompressed pictures on one batch, by a plan from other prompts and by one from the batch itself."""
    texts = world.texts(min(BATCH, prompts), CALIBRATION_PROMPTS)
    base = world.sample(texts, None, context, "without compression")
    settings = {"experiment": "transfer", "model": MODEL, "prompts": len(texts), "steps": STEPS, "delta": DELTA}
    records = []
    for name, own in (("plan of other prompts", None), ("plan of these prompts", texts)):
        plan = world.calibrate(world.config(DELTA), own)
        outcome = world.sample(texts, plan, context, name)
        distance = float(psnr(outcome.images, base.images).clamp(max=PSNR_CEILING).mean())
        records.append(Record("ditfastattn2", name, "psnr", distance, "dB", settings, samples=len(texts)))
        records.append(
            Record("ditfastattn2", name, "attention_removed", 1 - plan.kept(), "", settings, samples=len(texts))
        )
    return records
