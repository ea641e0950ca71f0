"""Search for a policy: NSGA-II over depth and pruning ratio of every call, maximising quality and minimising cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from pared_hooks import ConfigError
from pared_hooks.files import write_whole

from dato.costs import UnitCosts
from dato.functional import FULL, crowding_distance, nondominated_sort
from dato.policy import Policy, PolicyError
from dato.variation import Genome, SearchSpace

Evaluate = Callable[[Policy], float]
_SCHEMA = "dato.search/1"


@dataclass(frozen=True)
class Generation:
    """What is known after one generation."""

    index: int
    evaluations: int
    """Policies evaluated so far."""
    front: tuple[tuple[float, float], ...]
    """(quality, cost) of the policies so far that no other beats in both, cheapest first."""


@dataclass(frozen=True)
class SearchResult:
    """Outcome of `search`."""

    front: list[tuple[Policy, float, float]]
    """(policy, quality, cost) of every policy that no other beats in both, cheapest first."""
    history: list[Generation] = field(default_factory=list)

    def best(self, max_cost: float) -> Policy:
        """The policy of highest quality that costs at most `max_cost`. Raises `ValueError` when there is none."""
        affordable = [(quality, policy) for policy, quality, cost in self.front if cost <= max_cost]
        if not affordable:
            cheapest = min(cost for _, _, cost in self.front)
            raise ValueError(f"max_cost={max_cost:g}: the cheapest policy found costs {cheapest:g}")
        return max(affordable, key=lambda item: item[0])[1]

    def to_json(self) -> str:
        """The front and the history as JSON."""
        front = [{"policy": p.to_dict(), "quality": quality, "cost": cost} for p, quality, cost in self.front]
        history = [{"index": g.index, "evaluations": g.evaluations, "front": g.front} for g in self.history]
        return json.dumps({"schema": "dato.front/1", "front": front, "history": history}, indent=1)


def search(
    evaluate: Evaluate,
    *,
    num_calls: int,
    depths: Sequence[int] = (0, 1, FULL),
    ratios: Sequence[float] = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7),
    unit_costs: UnitCosts | Callable[[Policy], float],
    population: int = 16,
    generations: int = 20,
    seed: int = 0,
    init: Iterable[Policy] | None = None,
    callback: Callable[[Generation], None] | None = None,
    checkpoint: str | Path | None = None,
) -> SearchResult:
    """Find policies that trade quality against cost (section 3.6): NSGA-II with SBX and polynomial mutation.

    `evaluate(policy)` returns the quality, higher is better; for a fair ranking it must use the same prompts and the
    same initial latents every time. `unit_costs` gives the cost: FLOPs of `Policy.cost`, or any function of the policy
    such as a clock. The first of `generations` generations is random, with the policies of `init` in it. No policy is
    evaluated twice; at most `population * generations` are. After every evaluation `checkpoint` holds all of them, and
    a search with the same arguments continues from it with the same result; `callback` then sees every generation
    again.

    Raises `ConfigError` for a wrong argument or the checkpoint of another search, `PolicyError` for an `init` policy
    with other depths, and `ValueError` when a quality or cost is not finite.
    """
    _check_counts(num_calls=num_calls, population=population, generations=generations)
    space = SearchSpace(num_calls, tuple(depths), tuple(ratios))
    if isinstance(unit_costs, UnitCosts):
        for depth in space.depths:
            if depth > unit_costs.num_units:
                raise PolicyError(f"depths: {depth} exceeds the {unit_costs.num_units} units of this model", "depths")
    settings = {"num_calls": num_calls, "depths": space.depths, "ratios": space.ratios, "seed": seed}
    record = _Record(
        evaluate, _cost_function(unit_costs), space, settings, None if checkpoint is None else Path(checkpoint)
    )
    rng = Random(seed)

    current = [space.encode(policy) for policy in init or ()]
    seen = set(current)
    current = list(dict.fromkeys(current))[:population]
    _fill(current, population, seen, partial(space.random, rng), rng, space)
    history: list[Generation] = []
    for index in range(generations):
        if index:
            offspring: list[Genome] = []
            keys = _rank([record.objectives[genome] for genome in current])
            _fill(offspring, population, seen, partial(_breed, current, keys, space, rng), rng, space)
            for genome in offspring:
                record.evaluate(genome)
            current = _survivors([*current, *offspring], record.objectives, population)
        else:
            for genome in current:
                record.evaluate(genome)
        history.append(Generation(index, len(record.objectives), record.front_values()))
        if callback is not None:
            callback(history[-1])
    return SearchResult(record.front(), history)


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area that (quality, cost) points dominate above `reference = (lowest quality, highest cost)`."""
    area, floor = 0.0, reference[0]
    # From the cheapest on, each point adds the strip of qualities above all cheaper ones.
    for quality, cost in sorted(points, key=lambda point: (point[1], -point[0])):
        if quality > floor and cost < reference[1]:
            area += (quality - floor) * (reference[1] - cost)
            floor = quality
    return area


class _Record:
    """Everything evaluated in this search, and the file that remembers it."""

    def __init__(
        self,
        evaluate: Evaluate,
        cost_of: Callable[[Policy], float],
        space: SearchSpace,
        settings: dict[str, Any],
        path: Path | None,
    ) -> None:
        self.objectives: dict[Genome, tuple[float, float]] = {}
        """By genome: (-quality, cost), both minimised."""
        self._evaluate, self._cost_of, self._space = evaluate, cost_of, space
        self._settings, self._path = json.loads(json.dumps(settings)), path
        self._known: dict[Genome, tuple[float, float]] = {}
        if path is not None and path.exists():
            self._load(path)

    def evaluate(self, genome: Genome) -> None:
        """Evaluate `genome`, or look it up when an earlier run of this search has."""
        if genome not in self._known:
            policy = self._space.decode(genome)
            quality, cost = float(self._evaluate(policy)), float(self._cost_of(policy))
            if not (math.isfinite(quality) and math.isfinite(cost)):
                raise ValueError(f"evaluate gave quality {quality} and cost {cost} for {policy}; both must be finite")
            self._known[genome] = (-quality, cost)
            if self._path is not None:
                self._save(self._path)
        self.objectives[genome] = self._known[genome]

    def front(self) -> list[tuple[Policy, float, float]]:
        """The policies evaluated so far that no other dominates, cheapest first."""
        best: list[Genome] = []
        # Cheapest first: a policy is beaten by a cheaper one unless it loses less; equals of both kinds stay.
        for genome in sorted(self.objectives, key=lambda genome: (self.objectives[genome][::-1], genome)):
            loss, _ = objectives = self.objectives[genome]
            if not best or loss < self.objectives[best[-1]][0] or objectives == self.objectives[best[-1]]:
                best.append(genome)
        return [
            (self._space.decode(genome), -loss, cost) for genome in best for loss, cost in [self.objectives[genome]]
        ]

    def front_values(self) -> tuple[tuple[float, float], ...]:
        """(quality, cost) of `front`."""
        return tuple((quality, cost) for _, quality, cost in self.front())

    def _load(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["schema"] != _SCHEMA:
                raise ValueError(f"schema {stored['schema']!r}")
            settings = stored["settings"]
            known = {tuple(genome): (float(loss), float(cost)) for genome, loss, cost in stored["evaluations"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"checkpoint={str(path)!r} is not a dato search checkpoint: {error}", "checkpoint"
            ) from None
        if settings != self._settings:
            raise ConfigError(
                f"checkpoint={str(path)!r} belongs to a search with {settings}, this one has {self._settings}",
                "checkpoint",
            )
        self._known = known

    def _save(self, path: Path) -> None:
        evaluations = [[genome, loss, cost] for genome, (loss, cost) in self._known.items()]
        text = json.dumps({"schema": _SCHEMA, "settings": self._settings, "evaluations": evaluations})
        write_whole(path, text)


def _cost_function(unit_costs: UnitCosts | Callable[[Policy], float]) -> Callable[[Policy], float]:
    if isinstance(unit_costs, UnitCosts):
        return partial(Policy.cost, unit_costs=unit_costs)
    return unit_costs


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"search: {name} = {value!r} is not valid: a whole number of at least 1", name)


def _fill(
    genomes: list[Genome],
    size: int,
    seen: set[Genome],
    draw: Callable[[], Genome],
    rng: Random,
    space: SearchSpace,
) -> None:
    """Add drawn genomes that were never seen until there are `size`; repetitions get random genes."""
    for _ in range(20 * size):
        if len(genomes) >= size:
            return
        genome = draw()
        if genome in seen:
            genome = space.perturb(genome, rng)
        if genome not in seen:
            seen.add(genome)
            genomes.append(genome)


def _rank(objectives: Sequence[tuple[float, float]]) -> list[tuple[int, float]]:
    """(rank, -crowding distance) of each row: smaller is better."""
    ranks = nondominated_sort(objectives)
    keys: list[tuple[int, float]] = [(rank, 0.0) for rank in ranks]
    for level in set(ranks):
        front = [i for i, rank in enumerate(ranks) if rank == level]
        for i, distance in zip(front, crowding_distance([objectives[i] for i in front]), strict=True):
            keys[i] = (level, -distance)
    return keys


def _breed(parents: list[Genome], keys: list[tuple[int, float]], space: SearchSpace, rng: Random) -> Genome:
    """One child of two winners of binary tournaments."""

    def tournament() -> Genome:
        first, second = rng.randrange(len(parents)), rng.randrange(len(parents))
        return parents[min(first, second, key=lambda i: keys[i])]

    return space.mutate(space.cross(tournament(), tournament(), rng), rng)


def _survivors(genomes: list[Genome], objectives: dict[Genome, tuple[float, float]], size: int) -> list[Genome]:
    keys = _rank([objectives[genome] for genome in genomes])
    order = sorted(range(len(genomes)), key=lambda i: keys[i])
    return [genomes[i] for i in order[:size]]
