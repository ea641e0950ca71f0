"""The genomes of the policy search: coding, random individuals, crossover and mutation on integer codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from pared_hooks import ConfigError

from dato.functional import FULL
from dato.policy import Policy, PolicyError

Genome = tuple[int, ...]
"""Codes of the depths of calls 1.. and of the ratios of calls 0..: positions in the sorted choices."""

CROSSOVER_PROBABILITY, CROSSOVER_ETA = 0.8, 15.0
MUTATION_PROBABILITY = 0.8
# With a handful of codes, rounding undoes nearly every step of the usual eta = 15.
MUTATION_ETA = 3.0
SEGMENTS = 3
MAX_FULL_PER_SEGMENT = 3


@dataclass(frozen=True)
class SearchSpace:
    """All policies over `num_calls` calls with values from `depths` and `ratios`; call 0 is FULL."""

    num_calls: int
    depths: tuple[int, ...]
    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        # Sorted by how much is computed, so that neighbouring codes mean similar policies.
        depths = sorted(set(self.depths), key=lambda depth: math.inf if depth == FULL else depth)
        ratios = sorted({float(ratio) for ratio in self.ratios})
        if not depths or not all(isinstance(depth, int) and depth >= FULL for depth in depths):
            raise ConfigError(f"search: depths = {self.depths!r} is not valid: -1, 0 or numbers of units", "depths")
        if not ratios or not all(0 <= ratio < 1 for ratio in ratios):
            raise ConfigError(f"search: ratios = {self.ratios!r} is not valid: numbers in [0, 1)", "ratios")
        object.__setattr__(self, "depths", tuple(depths))
        object.__setattr__(self, "ratios", tuple(ratios))

    def decode(self, genome: Genome) -> Policy:
        """The policy of a genome."""
        depth = [FULL, *(self.depths[code] for code in genome[: self.num_calls - 1])]
        return Policy(depth, [self.ratios[code] for code in genome[self.num_calls - 1 :]])

    def encode(self, policy: Policy) -> Genome:
        """The genome nearest to `policy`, resampled and with its ratios rounded to the choices.

        Raises `PolicyError` for a depth that is not among the choices.
        """
        policy = policy.resample(self.num_calls)
        for depth in policy.depth[1:]:
            if depth not in self.depths:
                raise PolicyError(f"init: depth {depth} is not among the searched depths {self.depths}", "init")
        depth_codes = [self.depths.index(depth) for depth in policy.depth[1:]]
        ratio_codes = [self.ratios.index(min(self.ratios, key=partial(_distance, ratio))) for ratio in policy.ratio]
        return self._canonical([*depth_codes, *ratio_codes])

    def random(self, rng: Random) -> Genome:
        """A random genome as the paper draws them: few FULL calls in each third of the run, the rest even."""
        calls = self.num_calls - 1
        cheap = [code for code, depth in enumerate(self.depths) if depth != FULL] or [0]
        depth_codes = [rng.choice(cheap) for _ in range(calls)]
        if FULL in self.depths:
            for segment in range(SEGMENTS):
                inside = range(segment * calls // SEGMENTS, (segment + 1) * calls // SEGMENTS)
                count = rng.randint(0, min(MAX_FULL_PER_SEGMENT, len(inside)))
                for call in rng.sample(inside, count):
                    depth_codes[call] = self.depths.index(FULL)
        constant = rng.randrange(len(self.ratios)) if rng.random() < 0.5 else None
        ratio_codes = [rng.randrange(len(self.ratios)) if constant is None else constant for _ in range(self.num_calls)]
        return self._canonical([*depth_codes, *ratio_codes])

    def cross(self, first: Genome, second: Genome, rng: Random) -> Genome:
        """One child by simulated binary crossover with rounding."""
        if rng.random() >= CROSSOVER_PROBABILITY:
            return first
        child = []
        for a, b, choices in zip(first, second, self._choices(), strict=True):
            u = rng.random()
            spread = (2 * u if u < 0.5 else 1 / (2 * (1 - u))) ** (1 / (CROSSOVER_ETA + 1))
            # Half of the genes change places, which makes the two possible children equally likely.
            towards = 1 if rng.random() < 0.5 else -1
            child.append(_rounded(0.5 * (a + b) + towards * 0.5 * spread * (a - b), choices))
        return self._canonical(child)

    def mutate(self, genome: Genome, rng: Random) -> Genome:
        """Polynomial mutation with rounding; two genes of a genome on average."""
        if rng.random() >= MUTATION_PROBABILITY:
            return genome
        choices = self._choices()
        rate = min(1.0, 2 / len(genome))
        return self._canonical(
            [
                _rounded(code + _polynomial_step(rng.random()) * count, count) if rng.random() < rate else code
                for code, count in zip(genome, choices, strict=True)
            ]
        )

    def perturb(self, genome: Genome, rng: Random) -> Genome:
        """`genome` with a few genes drawn afresh, to leave a genome that is already known."""
        genes, choices = list(genome), self._choices()
        for _ in range(rng.randint(1, 3)):
            position = rng.randrange(len(genes))
            genes[position] = rng.randrange(choices[position])
        return self._canonical(genes)

    def _choices(self) -> list[int]:
        """Number of codes of each gene."""
        return [len(self.depths)] * (self.num_calls - 1) + [len(self.ratios)] * self.num_calls

    def _canonical(self, genes: Sequence[int]) -> Genome:
        """Genes with the ratio of calls that compute nothing set to the first choice, as it has no effect."""
        calls = self.num_calls - 1
        ratio_codes = [
            0 if call and self.depths[genes[call - 1]] == 0 else code for call, code in enumerate(genes[calls:])
        ]
        return (*genes[:calls], *ratio_codes)


def _distance(a: float, b: float) -> float:
    return abs(a - b)


def _rounded(value: float, choices: int) -> int:
    return min(max(math.floor(value + 0.5), 0), choices - 1)


def _polynomial_step(u: float) -> float:
    """Step of polynomial mutation, as a share of the range."""
    if u < 0.5:
        return (2 * u) ** (1 / (MUTATION_ETA + 1)) - 1
    return 1 - (2 * (1 - u)) ** (1 / (MUTATION_ETA + 1))
