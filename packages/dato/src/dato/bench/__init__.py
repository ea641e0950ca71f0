"""What `pared bench dato` measures: quality at equal cost, the mechanism, the search, and speed at full size."""

from __future__ import annotations

from pared_bench import BenchContext, Record

from dato.policy import Policy

EXPERIMENTS = ("search", "quality", "mechanism", "speed")


def run(context: BenchContext, *, experiments: str = ",".join(EXPERIMENTS), prompts: int = 128) -> list[Record]:
    """Measure `experiments` (names joined by commas); the proof in miniature uses `prompts` prompts.

    Raises `ValueError` for an unknown experiment or fewer than two prompts.
    """
    chosen = [name.strip() for name in experiments.split(",") if name.strip()]
    if unknown := sorted(set(chosen) - set(EXPERIMENTS)):
        raise ValueError(f"experiments={unknown[0]!r} must be among {', '.join(EXPERIMENTS)}")
    if not 2 <= prompts <= 500:
        raise ValueError(f"prompts={prompts!r} must be 2 to 500")
    records: list[Record] = []
    if {"search", "quality", "mechanism"} & set(chosen):
        import pared_zoo

        from dato.bench import mechanism, quality, searching
        from dato.bench.claims import claims

        pipe = pared_zoo.load("sd-world").to(context.device)
        searched: list[Policy] = []
        if "search" in chosen:
            found, searched = searching.run(context, pipe)
            records += found
        if "quality" in chosen:
            records += quality.run(context, pipe, prompts, searched)
        if "mechanism" in chosen:
            records += mechanism.run(context, pipe)
        records += claims(records)
    if "speed" in chosen:
        from dato.bench import speed

        records += speed.run(context)
    return records
