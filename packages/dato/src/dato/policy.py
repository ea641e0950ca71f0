"""`Policy`: how deep each denoiser call computes, and how many tokens its self-attention prunes."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from pared_hooks import Config, ConfigError

from dato.functional import FULL, resample_policy

if TYPE_CHECKING:
    from dato.costs import UnitCosts

PRESET_CALLS = 51
"""Calls of a 50-step run of PNDM, which the published schedules were searched on."""

FEW_CALLS = 5
"""Runs with fewer calls keep their last call FULL as well: there is no later call to mend it."""


class PolicyError(ConfigError):
    """A policy is malformed, unknown, or asks for a depth that the model does not have; `field` names the part."""


@dataclass(frozen=True)
class Policy(Config):
    """A schedule over the denoiser calls of one run (section 3.1).

    `depth[c]` is what call `c` computes: -1 (`FULL`) everything, 0 nothing (the previous prediction is returned),
    `k >= 1` the `k` shallowest units of the model. `ratio[c]` in [0, 1) is the share of tokens that its
    self-attention prunes; one number stands for all calls. Call 0 of a run is always FULL, whatever `depth[0]` says.
    Raises `PolicyError` for empty or unequal lengths and for values out of range.
    """

    depth: tuple[int, ...]
    ratio: tuple[float, ...] = 0.4  # type: ignore[assignment]  # spread over the calls by __post_init__

    if TYPE_CHECKING:

        def __init__(self, depth: Sequence[int], ratio: Sequence[float] | float = 0.4) -> None: ...

    def __post_init__(self) -> None:
        if isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool):
            length = len(self.depth) if isinstance(self.depth, Sequence) else 1
            object.__setattr__(self, "ratio", (float(self.ratio),) * length)
        for name in ("depth", "ratio"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        try:
            super().__post_init__()
        except ConfigError as error:
            raise PolicyError(str(error), error.field) from None
        self.check(len(self.depth) >= 1, "depth", self.depth, "at least one call")
        self.check(len(self.ratio) == len(self.depth), "ratio", self.ratio, f"{len(self.depth)} values, one per call")
        for depth in self.depth:
            self.check(depth >= FULL, "depth", depth, "-1 (everything), 0 (nothing) or a number of units")
        for ratio in self.ratio:
            self.check(0 <= ratio < 1, "ratio", ratio, "at least 0 and below 1")

    def check(self, condition: bool, field: str, value: object, valid: str) -> None:
        """Raise `PolicyError` for `field` unless `condition` holds."""
        if not condition:
            raise PolicyError(f"Policy.{field} = {value!r} is not valid: {valid}", field)

    @property
    def num_calls(self) -> int:
        """Number of denoiser calls the policy was written for."""
        return len(self.depth)

    @classmethod
    def uniform(cls, n: int, interval: int, depth: int = 1, ratio: float = 0.4) -> Policy:
        """FULL at every `interval`-th of `n` calls and `depth` between: DeepCache's schedule."""
        if n < 1:
            raise PolicyError(f"n={n} calls: at least 1 is needed", "depth")
        if interval < 1:
            raise PolicyError(f"interval={interval}: at least 1 is needed", "depth")
        return cls(tuple(FULL if call % interval == 0 else depth for call in range(n)), ratio)

    @classmethod
    def from_preset(cls, name: str, num_calls: int = PRESET_CALLS) -> Policy:
        """The policy called `name`, for `num_calls` calls: one of `preset_names()` or "uniform-N".

        Raises `PolicyError` that lists the presets when the name is unknown.
        """
        uniform = re.fullmatch(r"uniform-([1-9]\d{0,5})", name)
        if uniform:
            return cls.uniform(num_calls, int(uniform.group(1)))
        if name not in preset_names():
            raise PolicyError(f"no preset {name!r}; known: {', '.join(preset_names())}, uniform-N", "policy")
        return cls.from_dict(_read_preset(name)["policy"]).resample(num_calls)

    def resample(self, m: int) -> Policy:
        """The same schedule over `m` calls, by nearest index; call 0 becomes FULL (section 3.7)."""
        depth, ratio = resample_policy(self.depth, self.ratio, m)
        return Policy(depth, ratio)

    def for_run(self, num_calls: int, first_call: int = 0) -> Policy:
        """What a run does: the schedule over `num_calls` calls from `first_call` on (section 3.7).

        `first_call` is where image-to-image starts; the first remaining call is FULL. With fewer than five calls
        the last one is FULL too, with a warning.
        """
        if not 0 <= first_call < num_calls:
            raise PolicyError(f"first_call={first_call} is outside 0..{num_calls - 1}", "depth")
        whole = self.resample(num_calls)
        depth, ratio = list(whole.depth[first_call:]), whole.ratio[first_call:]
        depth[0] = FULL
        if len(depth) < FEW_CALLS:
            depth[-1] = FULL
            warnings.warn(
                f"dato: a run of {len(depth)} denoiser calls leaves little to save; "
                "its first and last call compute everything",
                stacklevel=2,
            )
        return Policy(depth, ratio)

    def with_ratio(self, ratio: float) -> Policy:
        """The same depths with one pruning ratio; 0 leaves the cache alone at work."""
        return Policy(self.depth, ratio)

    def actions(self) -> dict[str, int]:
        """How many calls do what: keys "full", "skip" and "depth-k", call 0 counted as FULL."""
        return dict(Counter(action_name(depth) for depth in (FULL, *self.depth[1:])))

    def check_depth(self, num_units: int) -> None:
        """Raise `PolicyError` when a call asks for more units than the model has."""
        deepest = max(self.depth)
        if deepest > num_units:
            raise PolicyError(
                f"depth {deepest} exceeds the {num_units} units of this model; valid: -1 (everything), 0..{num_units}",
                "depth",
            )

    def cost(self, unit_costs: UnitCosts) -> float:
        """FLOPs of one run, pruning and matching included; call 0 counts as FULL."""
        self.check_depth(unit_costs.num_units)
        calls = zip((FULL, *self.depth[1:]), self.ratio, strict=True)
        return sum(unit_costs.call(depth, ratio).total for depth, ratio in calls)

    def speedup(self, unit_costs: UnitCosts) -> float:
        """FLOPs of the run without DaTo divided by `cost`."""
        return self.num_calls * unit_costs.full / self.cost(unit_costs)


def action_name(depth: int) -> str:
    """Name of a depth in statistics and tables: "full", "skip" or "depth-k"."""
    return {FULL: "full", 0: "skip"}.get(depth, f"depth-{depth}")


@cache
def preset_names() -> tuple[str, ...]:
    """Names of the policies that come with the package, sorted; "uniform-N" is valid besides."""
    files = resources.files("dato").joinpath("presets").iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def preset_description(name: str) -> str:
    """One sentence on where the preset `name` comes from."""
    return str(_read_preset(name)["description"])


@cache
def _read_preset(name: str) -> dict[str, Any]:
    return json.loads(resources.files("dato").joinpath("presets", f"{name}.json").read_text(encoding="utf-8"))
