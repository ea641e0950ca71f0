"""`Plan`: which method every head takes at every step, as a portable file."""

from __future__ import annotations

import hashlib
import inspect
import json
import string
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pared_hooks import Config, DenoiserView
from pared_hooks.files import write_whole

from ditfastattn2.adapters.base import heads_of, sites_of
from ditfastattn2.config import DiTFastAttnV2Config
from ditfastattn2.errors import PlanMismatch
from ditfastattn2.functional import plan_density
from ditfastattn2.methods import FULL, Method

FULL_LETTER = "-"
LETTERS = string.ascii_letters


@dataclass(frozen=True)
class LayerPlan(Config):
    """One attention module: its path, its heads, where text is in its sequence, and what its heads gave up.

    `mean_error` and `max_error` are relative squared errors over heads and steps, of the methods chosen.
    """

    name: str
    heads: int
    text: Literal["first", "last"] | None
    mean_error: float = 0.0
    max_error: float = 0.0


@dataclass(frozen=True)
class Plan(Config):
    """The methods of all heads over a run; made by `calibrate`, used by `apply`.

    model, model_digest: class of the denoiser and digest of its architecture.
    num_vision, num_text, frames: tokens of the picture or video, of text, and frames among the former.
    height, width: of the picture in pixels; None if they were not given.
    density: share of the attention that is computed, as calibrated.
    num_steps: evaluations of a run.
    choices: by guidance branch ("cond" also for batched guidance), one string a step: for each layer, a letter a head,
        layers separated by a space; "-" full, "a" the first of `config.methods`, "b" the second ...
    guidance: "batched" (one call for both branches), "separate" or "none".
    """

    schema: ClassVar[str | None] = "pared.dfa2/1"

    model: str
    model_digest: str
    layers: tuple[LayerPlan, ...]
    num_vision: int
    num_text: int
    num_steps: int
    config: DiTFastAttnV2Config
    choices: dict[str, tuple[str, ...]]
    guidance: Literal["batched", "separate", "none"] = "none"
    frames: int = 1
    height: int | None = None
    width: int | None = None
    density: float | None = None
    scheduler: str | None = None
    versions: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value, least in (
            ("num_vision", self.num_vision, 1),
            ("num_text", self.num_text, 0),
            ("num_steps", self.num_steps, 1),
            ("frames", self.frames, 1),
        ):
            self.check(value >= least, field, value, f"at least {least}")
        self.check(bool(self.layers), "layers", self.layers, "at least one layer")
        self.check(bool(self.choices), "choices", self.choices, "at least one branch")
        allowed = set(FULL_LETTER + LETTERS[: len(self.config.methods)])
        for branch, steps in self.choices.items():
            self.check(len(steps) == self.num_steps, "choices", len(steps), f"{self.num_steps} steps, in {branch!r}")
            for step, text in enumerate(steps):
                parts = text.split(" ")
                fits = len(parts) == len(self.layers) and all(
                    len(part) == layer.heads and set(part) <= allowed
                    for part, layer in zip(parts, self.layers, strict=True)
                )
                valid = f"a letter of {''.join(sorted(allowed))} for each head of {len(self.layers)} layers"
                self.check(fits, "choices", text, f"{valid}, in {branch!r} at step {step}")

    # Files

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_whole(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a plan; raises `OSError`, or `ConfigError` for what is no plan."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    # What it says

    def branch_for(self, branch: str) -> str:
        """Return the branch whose choices a forward of `branch` takes: its own, or that of the conditional one."""
        return branch if branch in self.choices else "cond" if "cond" in self.choices else next(iter(self.choices))

    def letters(self, branch: str, step: int, layer: int) -> str:
        """Return the letter of each head; `branch` is one of `choices`."""
        return self.choices[branch][step].split(" ")[layer]

    def methods(self, branch: str, step: int, layer: int) -> tuple[Method, ...]:
        """Return the method of each head."""
        return methods_of(self.letters(branch, step, layer), self.config)

    def density_at(self, branch: str, step: int, layer: int) -> float:
        """Share of the attention of a layer that is computed at a step; halves of shared guidance count half."""
        text = self.num_text if self.layers[layer].text is not None else 0
        return density_of(
            self.letters(branch, step, layer), self.config, self.num_vision, text, self.layers[layer].text == "first"
        )

    def kept(self, branch: str | None = None) -> float:
        """Share of all attention that is computed, over steps, heads and layers (and branches), by query-key pairs."""
        total = computed = 0.0
        for name in self.choices if branch is None else (branch,):
            for step in range(self.num_steps):
                for index, layer in enumerate(self.layers):
                    weight = layer.heads * (self.num_vision + (self.num_text if layer.text else 0)) ** 2
                    total += weight
                    computed += weight * self.density_at(name, step, index)
        return computed / total

    def summary(self) -> str:
        """Return a text: what was removed by layer and by step, by which methods, at which error of a head."""
        branches = list(self.choices)
        lines = [
            f"{self.model}, {self.num_steps} steps, {self.num_vision} vision and {self.num_text} text tokens, "
            f"{len(self.layers)} layers, delta {self.config.delta:g}: {1 - self.kept():.1%} of attention removed",
            "methods: - full, " + ", ".join(f"{LETTERS[i]} {name}" for i, name in enumerate(self.config.methods)),
        ]
        for branch in branches:
            lines.append(f"branch {branch}: {1 - self.kept(branch):.1%} removed; by layer and step, in tenths:")
            width = max(len(layer.name) for layer in self.layers)
            for index, layer in enumerate(self.layers):
                removed = [1 - self.density_at(branch, step, index) for step in range(self.num_steps)]
                row = "".join(str(min(9, int(10 * one))) for one in removed)
                errors = f"error {layer.mean_error:.4f}, at most {layer.max_error:.4f}"
                lines.append(f"  {layer.name:<{width}} {row} {sum(removed) / len(removed):6.1%}  {errors}")
        return "\n".join(lines)

    # Whether it fits

    def differences(self, view: DenoiserView, *, strict: bool = True) -> list[str]:
        """Return what of a model differs from that of the plan; `strict` looks at its configuration too."""
        found = []
        if type(view.model).__name__ != self.model:
            found.append(f"class {type(view.model).__name__} instead of {self.model}")
        names = [site.name for site in sites_of(view)]
        if names != [layer.name for layer in self.layers]:
            found.append(f"{len(names)} attention layers instead of {len(self.layers)}, or others")
        else:
            heads = {heads_of(site) for site in sites_of(view)}
            if heads != {layer.heads for layer in self.layers}:
                found.append(f"{sorted(heads)} heads instead of {sorted({layer.heads for layer in self.layers})}")
        if strict and not found and digest_of(view.model) != self.model_digest:
            found.append(f"another configuration of {self.model}")
        return found

    def check_model(self, view: DenoiserView, *, strict: bool = True) -> None:
        """Raise `PlanMismatch` listing the differences unless the plan was made for such a model."""
        found = self.differences(view, strict=strict)
        if found:
            raise PlanMismatch(found)

    def retarget(self, *, V: int | None = None, steps: int | None = None, T: int | None = None) -> Plan:
        """Return the plan for other numbers of vision tokens, steps or text tokens.

        Windows are shares of the picture, so they follow. Step j of the new plan takes the choices of the old step at
        the same relative position; a reused output whose predecessor was left out becomes full attention.
        """
        changes: dict[str, Any] = {}
        if V is not None and self.num_vision != V:
            changes |= {"num_vision": V, "height": None, "width": None}
        if T is not None:
            changes["num_text"] = T
        if steps is not None and steps != self.num_steps:
            self.check(steps >= 1, "num_steps", steps, "at least 1")
            changes["num_steps"] = steps
            changes["choices"] = {branch: self._resampled(rows, steps) for branch, rows in self.choices.items()}
        return self.replace(**changes)

    def _resampled(self, rows: tuple[str, ...], steps: int) -> tuple[str, ...]:
        last = self.num_steps - 1
        sources = [round(step * last / max(steps - 1, 1)) for step in range(steps)]
        cached = {LETTERS[i] for i, method in enumerate(self.config.parsed_methods()) if method.kind == "cached"}
        result = []
        for step, source in enumerate(sources):
            row = rows[source]
            if step == 0 or source - sources[step - 1] > 1:
                row = "".join(FULL_LETTER if letter in cached else letter for letter in row)
            result.append(row)
        return tuple(result)


@lru_cache(maxsize=4096)
def methods_of(letters: str, config: DiTFastAttnV2Config) -> tuple[Method, ...]:
    """Return the methods that letters stand for."""
    known = config.parsed_methods()
    return tuple(FULL if letter == FULL_LETTER else known[LETTERS.index(letter)] for letter in letters)


@lru_cache(maxsize=65536)
def density_of(letters: str, config: DiTFastAttnV2Config, num_vision: int, num_text: int, text_first: bool) -> float:
    """Share of the query-key pairs that heads of these letters compute."""
    computed = 0.0
    for method in methods_of(letters, config):
        windows = [method.window(num_vision)]
        one = plan_density(windows, num_vision, num_text, text_first, config.mask_block)
        computed += one / 2 if method.shares_guidance else one
    return computed / len(letters)


def digest_of(model: Any) -> str:
    """Return a short digest of a model's architecture: its class and what its configuration sets, not its weights.

    What has its default value is left out: other versions of diffusers know other options.
    """
    parameters = inspect.signature(type(model).__init__).parameters
    defaults = {name: _as_json(parameter.default) for name, parameter in parameters.items()}
    options = {name: _as_json(value) for name, value in dict(model.config).items() if not name.startswith("_")}
    kept = {name: value for name, value in options.items() if value != defaults.get(name)}
    return hashlib.sha256(_as_json([type(model).__name__, kept]).encode()).hexdigest()[:16]


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
