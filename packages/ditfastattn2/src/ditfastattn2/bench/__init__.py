"""What `pared bench ditfastattn2` measures: quality at equal cost, what heads look like, transfer, speed."""

from __future__ import annotations

from pared_bench import BenchContext, Record

EXPERIMENTS = ("patterns", "quality", "widest", "transfer", "cpu", "speed")


def run(context: BenchContext, *, experiments: str = ",".join(EXPERIMENTS), prompts: int = 64) -> list[Record]:
    """Measure `experiments` (names joined by commas); the proof in miniature uses `prompts` held-out prompts.

    Raises `ValueError` for an unknown experiment or a wrong number of prompts.
    """
    chosen = [name.strip() for name in experiments.split(",") if name.strip()]
    if unknown := sorted(set(chosen) - set(EXPERIMENTS)):
        raise ValueError(f"experiments={unknown[0]!r} must be among {', '.join(EXPERIMENTS)}")
    if not 2 <= prompts <= 400:
        raise ValueError(f"prompts={prompts!r} must be 2 to 400")
    records: list[Record] = []
    if {"patterns", "quality", "widest", "transfer"} & set(chosen):
        from ditfastattn2.bench import patterns, quality, transfer, widest
        from ditfastattn2.bench.claims import claims
        from ditfastattn2.bench.world import World

        world = World.load(context.device, context.seed)
        if "patterns" in chosen:
            records += patterns.run(context, world)
        if "quality" in chosen:
            records += quality.run(context, world, prompts)
        if "widest" in chosen:
            records += widest.run(context, world, prompts)
        if "transfer" in chosen:
            records += transfer.run(context, world, prompts)
        records += claims(records)
    if "cpu" in chosen:
        from ditfastattn2.bench import cpu

        records += cpu.run(context)
    if "speed" in chosen:
        from ditfastattn2.bench import speed

        records += speed.run(context)
    return records
