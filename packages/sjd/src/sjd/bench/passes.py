"""Passes per image of every rule, first guess, window and temperature, next to the entropy of what is drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from pared_bench import BenchContext, Record
from pared_bench.quality import bootstrap

from sjd.bench.world import PLAIN, Arm, Outcome, Sampling, World
from sjd.stats import summary

WINDOWS = (4, 8, 16, 32, 64)
USUAL = 16
RULES = {
    "Jacobi": Arm("Jacobi", jacobi=True),
    "independent": Arm("independent", refresh="independent"),
    "maximal": Arm("maximal"),
    "gumbel": Arm("gumbel", refresh="gumbel"),
    "gumbel, match": Arm("gumbel, match", refresh="gumbel", verify="match"),
}
INITS = ("random", "uniform", "left", "above", "left_sample", "above_sample", "auto")
SWEEP = (
    Sampling(guidance=1.0),
    Sampling(guidance=3.0),
    Sampling(guidance=7.5),
    Sampling(temperature=0.7),
    Sampling(temperature=1.3),
    Sampling(top_k=100),
    Sampling(top_k=20),
    Sampling(greedy=True),
)


def arms() -> Iterator[tuple[Arm, Sampling]]:
    """Every arm that is measured, with its sampling."""
    usual = Sampling()
    yield PLAIN, usual
    for window in (1, *WINDOWS):
        for name, arm in RULES.items():
            yield _sized(arm, name, window), usual
    for init in INITS:
        for name in ("independent", "maximal"):
            # "auto" is what the rules above use.
            if init != "auto":
                yield _sized(RULES[name], name, USUAL, init), usual
    for sampling in SWEEP:
        yield _sized(RULES["independent"], "independent", USUAL), sampling
        yield _sized(RULES["maximal"], "maximal", USUAL), sampling


def run(context: BenchContext, world: World, images: int) -> list[Record]:
    """Passes, tokens a pass, acceptance and survival of drafts; then what was expected of them, as margins."""
    records: list[Record] = []
    entropies: dict[Sampling, float] = {}
    found: dict[tuple[str, int, str, Sampling], Outcome] = {}
    for arm, sampling in context.track(list(arms()), "counting passes"):
        outcome = world.draw(arm, images, context.seed, sampling)
        if sampling not in entropies:
            entropies[sampling] = world.entropy(outcome.tokens, sampling)
        found[(arm.name, arm.window, arm.init, sampling)] = outcome
        records += _records(outcome, sampling, entropies[sampling])
    return records + claims(found)


def _sized(arm: Arm, name: str, window: int, init: str = "auto") -> Arm:
    return Arm(name, window, arm.refresh, init, arm.verify, arm.jacobi)


def _records(outcome: Outcome, sampling: Sampling, entropy: float) -> list[Record]:
    arm = outcome.arm
    settings = {
        "experiment": "passes",
        "model": "ar-world",
        "window": arm.window,
        "init": arm.init if arm.window else None,
        **sampling.describe(),
        "greedy": sampling.greedy,
        "images": len(outcome.tokens),
    }
    found = summary(outcome.runs)
    spread = bootstrap(lambda values: sum(values) / len(values), [float(one) for one in outcome.passes])
    mean = statistics.fmean(outcome.passes)
    values: dict[str, float | None] = {
        "tokens per pass": outcome.tokens.shape[1] / mean,
        "acceptance of the first draft": next(iter(found["acceptance"]), None),
        "survival of drafts": found["survival"],
        "entropy of what is drawn": entropy,
        "seconds": outcome.seconds,
    }
    units = {"seconds": "s", "entropy of what is drawn": "nat"}
    records = [
        Record("sjd", arm.name, "passes per image", mean, "", settings, (spread.low, spread.high), len(outcome.passes))
    ]
    return records + [
        Record("sjd", arm.name, metric, value, units.get(metric, ""), settings, samples=len(outcome.passes))
        for metric, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def claims(found: dict[tuple[str, int, str, Sampling], Outcome]) -> list[Record]:
    """What was expected of the table, each as a margin that is positive where it holds."""
    usual = Sampling()

    def passes(rule: str, window: int, init: str = "auto", sampling: Sampling = usual) -> float:
        return statistics.fmean(found[(rule, window, init, sampling)].passes)

    plain = passes("plain", 0)
    margins = {
        "Jacobi gains at most 15 % at a window of 16": 1.15 - plain / passes("Jacobi", USUAL),
        "independent refresh takes at most 1/1.7 of the passes at 16": plain / passes("independent", USUAL) - 1.7,
        "independent refresh gains at most 8 % from 16 to 64": 0.08
        - abs(passes("independent", 16) / passes("independent", 64) - 1),
        "maximal takes at most 1/1.4 of the passes of independent at 32": passes("independent", 32)
        / passes("maximal", 32)
        - 1.4,
        "above needs no more passes than random": passes("maximal", USUAL, "random")
        - passes("maximal", USUAL, "above"),
        "more guidance needs more passes, 1 to 3": passes("maximal", USUAL, sampling=Sampling(guidance=3.0))
        - passes("maximal", USUAL, sampling=Sampling(guidance=1.0)),
        "more guidance needs more passes, 3 to 7.5": passes("maximal", USUAL, sampling=Sampling(guidance=7.5))
        - passes("maximal", USUAL, sampling=Sampling(guidance=3.0)),
        "a lower temperature needs fewer passes": passes("maximal", USUAL)
        - passes("maximal", USUAL, sampling=Sampling(temperature=0.7)),
        "a smaller top-k needs fewer passes": passes("maximal", USUAL)
        - passes("maximal", USUAL, sampling=Sampling(top_k=20)),
    }
    settings = {"experiment": "claims about passes", "model": "ar-world"}
    return [Record("sjd", claim, "margin", value, "", settings) for claim, value in margins.items()]
