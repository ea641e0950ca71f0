"""What the measurements say about the claims of section 10: each as one margin, positive where the claim holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pared_bench import Record


@dataclass(frozen=True)
class Margin:
    """`better` minus `worse` (or, as a `ratio`, divided by it) minus `needed`."""

    claim: str
    metric: str
    better: str
    worse: str
    needed: float = 0.0
    ratio: bool = False
    lower_is_better: bool = False


def claims(records: Iterable[Record]) -> list[Record]:
    """The margins that can be told from `records` of the other experiments."""
    records = list(records)
    values = {(r.settings["experiment"], r.variant, r.metric): r for r in records}
    variants = {r.variant.partition(":")[0] for r in records if ":" in r.variant}
    result = []
    for experiment, margin in _margins(sorted(variants)):
        better = values.get((experiment, margin.better, margin.metric))
        worse = values.get((experiment, margin.worse, margin.metric))
        if better is None or worse is None or better.value is None or worse.value is None:
            continue
        value = better.value / worse.value if margin.ratio else better.value - worse.value
        value = -value if margin.lower_is_better else value
        unit = "" if margin.ratio else better.unit
        settings = {"experiment": "claims", "model": "sd-world", "needed": margin.needed}
        result.append(Record("dato", margin.claim, "margin", value - margin.needed, unit, settings))
    return result


def _margins(policies: Iterable[str]) -> Iterator[tuple[str, Margin]]:
    for name in policies:
        dato, cache = f"{name}: dato", f"{name}: cache only"
        uniform, few = f"{name}: DeepCache uniform", f"{name}: fewer steps, DPM-Solver++"
        yield "quality", Margin(f"{name}: pruning costs less than 1 dB", "psnr", dato, cache, -1.0)
        yield "quality", Margin(f"{name}: closer than uniform caching of its cost", "psnr", dato, uniform)
        yield (
            "quality",
            Margin(
                f"{name}: lower Frechet distance than uniform caching", "frechet", dato, uniform, lower_is_better=True
            ),
        )
        yield "quality", Margin(f"{name}: closer than fewer steps of DPM-Solver++", "psnr", dato, few)
        yield (
            "quality",
            Margin(f"{name}: lower Frechet distance than fewer steps", "frechet", dato, few, lower_is_better=True),
        )
        random = f"{name}: random pruned tokens"
        yield "quality", Margin(f"{name}: 1 dB better than pruning random tokens", "psnr", dato, random, 1.0)
        yield "mechanism", Margin(f"{name}: dynamics flatter than without dato", "dynamics", "base", dato)
        yield "mechanism", Margin(f"{name}: dynamics not flatter than with the cache alone", "dynamics", dato, cache)
    more = Margin(
        "search: 5 % more hypervolume than random search", "hypervolume", "search", "random search", 1.05, True
    )
    yield "search", more
    yield "search", Margin("search: more hypervolume than the presets", "hypervolume", "search", "presets")
