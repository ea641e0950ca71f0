"""What `pared bench mbq` measures: sensitivities, answers of a vision-language model and perplexity by method and bits,
sizes and speed."""

from __future__ import annotations

from pathlib import Path

from pared_bench import BenchContext, Record

EXPERIMENTS = ("sensitivity", "w3", "w4a8", "harder", "text", "sizes", "layers", "decode")


def run(
    context: BenchContext,
    *,
    experiments: str = ",".join(EXPERIMENTS),
    samples: int = 16,
    clips: int = 125,
    seeds: int = 3,
    texts: int = 4,
    model: Path | None = None,
) -> list[Record]:
    """Measure `experiments` (names joined by commas).

    `samples` clips calibrate, with `seeds` different draws; 8 questions about each of `clips` other ones are asked.
    `texts` pieces of 512 tokens calibrate SmolLM2, and twice as many are read. `model` is a folder with another
    ``vlm-world``; None: the shipped one. Raises ValueError for an unknown experiment or a count below one.
    """
    chosen = [name.strip() for name in experiments.split(",") if name.strip()]
    if unknown := sorted(set(chosen) - set(EXPERIMENTS)):
        raise ValueError(f"experiments={unknown[0]!r} must be among {', '.join(EXPERIMENTS)}")
    for name, count in (("samples", samples), ("clips", clips), ("seeds", seeds), ("texts", texts)):
        if count < 1:
            raise ValueError(f"{name}={count!r} must be at least 1")
    records: list[Record] = []
    if {"sensitivity", "w3", "w4a8", "harder"} & set(chosen):
        from mbq.bench import vlm

        study = vlm.Study(model, samples, clips, seeds, context.device)
        if "sensitivity" in chosen:
            records += vlm.sensitivities(context, study)
        for bits in ("w3", "w4a8"):
            if bits in chosen:
                records += vlm.compare(context, study, bits)
        if "harder" in chosen:
            records += vlm.harder(context, study)
    if "text" in chosen:
        from mbq.bench import text

        records += text.run(context, texts, 2 * texts)
    if "sizes" in chosen:
        from mbq.bench import sizes

        records += sizes.run(context)
    if "layers" in chosen:
        from mbq.bench import layers

        records += layers.run(context)
    if "decode" in chosen:
        from mbq.bench import decode

        records += decode.run(context)
    return records
