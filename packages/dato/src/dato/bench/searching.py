"""Section 10.3: a search on the zoo's model, against the shipped presets and against random search."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from pared_bench import BenchContext, Record

from dato.bench.arms import STEPS, costs_of
from dato.bench.quality import PRUNING
from dato.config import DaToConfig
from dato.costs import UnitCosts
from dato.fidelity import FidelityEvaluator
from dato.functional import FULL
from dato.policy import PRESET_CALLS, Policy, preset_names
from dato.search import Generation, SearchResult, hypervolume, search
from dato.variation import SearchSpace

POPULATION, GENERATIONS, PROMPTS = 12, 12, 8
RATIOS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7)


def run(context: BenchContext, pipe: Any) -> tuple[list[Record], list[Policy]]:
    """Search, measure the fronts by hypervolume, and return the best policies at the cost of each preset."""
    from pared_zoo.recipes.sd_world import GUIDANCE_SCALE
    from pared_zoo.world import caption, sample_scenes

    costs = costs_of(pipe, 1, DaToConfig())
    texts = [caption(scene) for scene in sample_scenes(PROMPTS, 40_000 + context.seed)]
    evaluate = FidelityEvaluator(
        pipe, texts, seed=context.seed, num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE
    )
    presets = [Policy.from_preset(name).with_ratio(PRUNING) for name in preset_names()]
    progress = iter(context.track(range(GENERATIONS), "search"))

    def advance(_: Generation) -> None:
        next(progress, None)

    result = search(
        evaluate,
        num_calls=PRESET_CALLS,
        depths=(0, 1, FULL),
        ratios=RATIOS,
        unit_costs=costs,
        population=POPULATION,
        generations=GENERATIONS,
        seed=context.seed,
        init=presets,
        callback=advance,
        checkpoint=Path(context.out) / "dato-search.json",
    )
    random_points = _random_search(context, evaluate, costs, POPULATION * GENERATIONS)
    fronts = {
        "search": [(quality, cost / costs.full) for _, quality, cost in result.front],
        "random search": random_points,
        "presets": [(evaluate(policy), policy.cost(costs) / costs.full) for policy in presets],
    }
    settings = {
        "experiment": "search",
        "model": "sd-world",
        "prompts": PROMPTS,
        "evaluations": POPULATION * GENERATIONS,
        "steps": STEPS,
    }
    return compare(fronts, settings), _at_cost(result, [policy.cost(costs) for policy in presets])


def compare(fronts: dict[str, list[tuple[float, float]]], settings: dict[str, Any]) -> list[Record]:
    """Hypervolume above 0 dB of each front of (quality in dB, cost in full calls), and how many presets it beats."""
    reference = (0.0, float(PRESET_CALLS))
    records = [
        Record("dato", name, "hypervolume", hypervolume(points, reference), "dB calls", settings)
        for name, points in fronts.items()
    ]
    beaten = sum(any(p[0] >= q[0] and p[1] <= q[1] for p in fronts["search"]) for q in fronts["presets"])
    return [*records, Record("dato", "search", "presets matched or dominated", beaten, "", settings)]


def _random_search(
    context: BenchContext, evaluate: FidelityEvaluator, costs: UnitCosts, evaluations: int
) -> list[tuple[float, float]]:
    space, rng = SearchSpace(PRESET_CALLS, (0, 1, FULL), RATIOS), Random(context.seed + 1)
    points = []
    for _ in context.track(range(evaluations), "random search"):
        policy = space.decode(space.random(rng))
        points.append((evaluate(policy), policy.cost(costs) / costs.full))
    return points


def _at_cost(result: SearchResult, targets: list[float]) -> list[Policy]:
    """The best policy found at each target cost, without repetition."""
    cheapest = min(cost for _, _, cost in result.front)
    return list(dict.fromkeys(result.best(max(target, cheapest)) for target in targets))
