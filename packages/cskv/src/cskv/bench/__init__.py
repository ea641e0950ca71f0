"""What `pared bench cskv` measures: quality by factors, window and bits, and beside other methods at equal bytes;
finetuning; memory; speed of decoding; how many sequences a GPU holds."""

from __future__ import annotations

from pared_bench import BenchContext, Record

EXPERIMENTS = ("quality", "equal-bytes", "finetune", "memory", "speed", "capacity")


def run(
    context: BenchContext,
    *,
    experiments: str = ",".join(EXPERIMENTS),
    sequences: int = 4,
    passkeys: int = 8,
    calibration: int = 10,
) -> list[Record]:
    """Measure `experiments` (names joined by commas) on SmolLM2-135M-Instruct.

    `sequences` of held-out text and `passkeys` prompts judge quality, `calibration` sequences of 1024 tokens fit the
    factors. Raises ValueError for an unknown experiment or a count below one (passkeys: below zero).
    """
    chosen = [name.strip() for name in experiments.split(",") if name.strip()]
    if unknown := sorted(set(chosen) - set(EXPERIMENTS)):
        raise ValueError(f"experiments={unknown[0]!r} must be among {', '.join(EXPERIMENTS)}")
    for name, count, least in (("sequences", sequences, 1), ("passkeys", passkeys, 0), ("calibration", calibration, 1)):
        if count < least:
            raise ValueError(f"{name}={count!r} must be at least {least}")
    records: list[Record] = []
    if {"quality", "equal-bytes", "finetune"} & set(chosen):
        from cskv.bench import quality

        study = quality.Study.prepare(context, sequences, passkeys, calibration)
        if "quality" in chosen:
            records += quality.run(context, study)
        if "equal-bytes" in chosen:
            from cskv.bench import equal_bytes

            records += equal_bytes.run(context, study)
        if "finetune" in chosen:
            records += quality.run_finetune(context, study)
    if "memory" in chosen:
        from cskv.bench import memory_table

        records += memory_table.run(context)
    if "speed" in chosen:
        from cskv.bench import speed

        records += speed.run(context)
    if "capacity" in chosen:
        from cskv.bench import capacity

        records += capacity.run(context)
    return records
