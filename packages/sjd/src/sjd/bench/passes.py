"""Passes per image of every rule, first guess, window and temperature, next to the entropy of what is drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from pared_bench import BenchContext, Record
from pared_bench.quality import bootstrap

from sjd.bench.world import PLAIN, Arm, Outcome, Sampling, World
from sjd.stats import summary

WINDOWS = (1, 4, 8, 16, 32, 64)
USUAL = 16
RULES = {
    "Jacobi": Arm("Jacobi", jacobi=True),
    "independent": Arm("independent", refresh="independent"),
    "maximal": Arm("maximal"),
    "gumbel": Arm("gumbel", refresh="gumbel"),
    "gumbel, match": Arm("gumbel, match", refresh="gumbel", verify="match"),
}
COMPARED = ("independent", "maximal")
LARGE = (16, 32, 64)
"""Windows at which rules are compared at other temperatures."""
TEMPERATURES = (1.5, 2.0, 2.5, 3.0)
"""A model of the toy world is nearly certain of most tokens; heated, it draws with the nats of a large model."""
HEATED = 2.5
"""The temperature at which what is known of large models is tested."""
INITS = ("random", "uniform", "left", "above", "left_sample", "above_sample", "auto")
SWEEP = (
    Sampling(guidance=1.0),
    Sampling(guidance=3.0),
    Sampling(guidance=7.5),
    Sampling(temperature=0.7),
    Sampling(temperature=1.3),
    Sampling(top_k=100),
    Sampling(top_k=20),
)
Job = tuple[Arm, Sampling]


def arms() -> list[Job]:
    """Everything that is measured: rules by window, first guesses by window, sampling, and greedy decoding."""
    usual, greedy = Sampling(), Sampling(greedy=True)
    jobs = [(PLAIN, usual), (PLAIN, greedy)]
    for window in WINDOWS:
        jobs += [(_sized(rule, window), usual) for rule in RULES]
        # Comparing with argmax p is Jacobi decoding as it was first published, whatever the rule.
        jobs.append((Arm("greedy Jacobi", window), greedy))
        # "auto" is what the rules above use.
        jobs += [(_sized(rule, window, init), usual) for rule in COMPARED for init in INITS if init != "auto"]
    jobs += [(_sized(rule, USUAL), sampling) for rule in COMPARED for sampling in SWEEP]
    heated = [Sampling(temperature=temperature) for temperature in TEMPERATURES]
    return jobs + [(_sized(rule, window), sampling) for sampling in heated for window in LARGE for rule in RULES]


def essential() -> list[Job]:
    """What the claims are about, a part of `arms`."""
    usual = Sampling()
    jobs = [(PLAIN, usual)]
    for sampling in (usual, Sampling(temperature=HEATED)):
        jobs.append((_sized("Jacobi", USUAL), sampling))
        jobs += [(_sized(rule, window), sampling) for rule in COMPARED for window in LARGE]
    jobs += [(_sized("maximal", USUAL, init), usual) for init in ("random", "above")]
    others = [Sampling(guidance=scale) for scale in (1.0, 3.0, 7.5)]
    return jobs + [(_sized("maximal", USUAL), one) for one in (*others, Sampling(temperature=0.7), Sampling(top_k=20))]


def run(context: BenchContext, world: World, images: int, jobs: Sequence[Job] | None = None) -> list[Record]:
    """Passes, tokens a pass, acceptance and survival of drafts; then what was expected of them, as margins.

    `jobs` holds `essential()`; None is `arms()`.
    """
    records: list[Record] = []
    entropies: dict[Sampling, float] = {}
    found: dict[tuple[str, int, str, Sampling], Outcome] = {}
    for arm, sampling in context.track(arms() if jobs is None else jobs, "counting passes"):
        outcome = world.draw(arm, images, context.seed, sampling)
        if sampling not in entropies:
            entropies[sampling] = 0.0 if sampling.greedy else world.entropy(outcome.tokens, sampling)
        found[(arm.name, arm.window, arm.init, sampling)] = outcome
        records += _records(outcome, sampling, entropies[sampling])
    return records + claims(found)


def _sized(rule: str, window: int, init: str = "auto") -> Arm:
    return replace(RULES[rule], window=window, init=init)


def _experiment(arm: Arm, sampling: Sampling) -> str:
    if sampling.greedy:
        return "passes, greedy"
    if sampling == Sampling(temperature=sampling.temperature) and sampling.temperature in TEMPERATURES:
        return "passes by temperature"
    if sampling != Sampling():
        return "passes by sampling"
    return "passes by rule" if arm.init == "auto" else "passes by first guess"


def _records(outcome: Outcome, sampling: Sampling, entropy: float) -> list[Record]:
    arm = outcome.arm
    settings = {
        "experiment": _experiment(arm, sampling),
        "model": "ar-world",
        "window": arm.window,
        "init": arm.init if arm.window else None,
        **sampling.describe(),
        "greedy": sampling.greedy,
        "images": len(outcome.tokens),
    }
    found = summary(outcome.runs)
    tested, accepted = (
        sum(sum(image.tested()[which]) for run in outcome.runs for image in run.images) for which in (0, 1)
    )
    spread = bootstrap(lambda values: sum(values) / len(values), [float(one) for one in outcome.passes])
    mean = statistics.fmean(outcome.passes)
    values: dict[str, float | None] = {
        "tokens per pass": outcome.tokens.shape[1] / mean,
        "acceptance": accepted / tested if tested else None,
        "acceptance of the first draft": next(iter(found["acceptance"]), None),
        "survival of drafts": found["survival"],
        "passes that commit one token": found["committed"].get(1, 0) / max(sum(found["committed"].values()), 1),
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

    def of_rules(sampling: Sampling) -> dict[str, float]:
        independent, maximal = (
            {window: passes(rule, window, sampling=sampling) for window in LARGE} for rule in COMPARED
        )
        return {
            "Jacobi gains at most 15 % at 16": 1.15 - plain / passes("Jacobi", USUAL, sampling=sampling),
            "independent takes at most 1/1.7 of the passes at 16": plain / independent[16] - 1.7,
            "independent gains at most 8 % from 16 to 64": 0.08 - abs(independent[16] / independent[64] - 1),
            "maximal takes at most 1/1.4 of the passes of independent at 32": independent[32] / maximal[32] - 1.4,
            "maximal takes fewer passes than independent at each": min(independent[w] - maximal[w] for w in LARGE),
        }

    margins = {
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
    records = _margins(margins, usual)
    for temperature in (1.0, *TEMPERATURES):
        sampling = Sampling(temperature=temperature)
        if ("Jacobi", USUAL, "auto", sampling) in found:
            records += _margins(of_rules(sampling), sampling)
    return records


def _margins(margins: dict[str, float], sampling: Sampling) -> list[Record]:
    settings = {"experiment": "claims about passes", "model": "ar-world", "temperature": sampling.temperature}
    return [Record("sjd", claim, "margin", value, "", settings) for claim, value in margins.items()]
