"""Making a plan: one pass over the denoising of a few prompts, each decision taken on what came before it (3.4)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pared_hooks import ConfigError, DenoiserView, Patch
from torch import Tensor

from ditfastattn2.adapters.base import heads_of, view_of
from ditfastattn2.apply import OWNER
from ditfastattn2.config import DiTFastAttnV2Config
from ditfastattn2.errors import CalibrationError, GradientError
from ditfastattn2.functional import head_rse, solve_head_plan
from ditfastattn2.heads import Inputs, Launch, Remainder, compute, full_attention, pick, put, remainder_of, window_of
from ditfastattn2.interception import Hook
from ditfastattn2.layout import Layout, Tokens
from ditfastattn2.memory import LayerMemory, stored
from ditfastattn2.methods import Method
from ditfastattn2.plan import FULL_LETTER, LETTERS, LayerPlan, Plan, density_of, digest_of
from ditfastattn2.progress import Checkpoint
from ditfastattn2.run import Call, HeadwiseRun

Progress = Callable[[int, int], None]


class Candidates:
    """What the methods would give at one attention, (B, S, H, D); arrows are computed once."""

    def __init__(self, inputs: Inputs, memory: LayerMemory, config: DiTFastAttnV2Config, *, reuse: bool) -> None:
        self.inputs = inputs
        self.memory = memory
        self._config = config
        self._reuse = reuse
        self._arrows: dict[Remainder, Tensor] = {}

    def output(self, method: Method) -> Tensor | None:
        """Return the output of all heads with one method, None where it has nothing to reuse."""
        q = self.inputs.q
        if method.kind == "cached":
            past = self.memory.output if self._reuse else None
            return None if past is None else past.to(q.device, q.dtype)
        if method.shares_guidance:
            return self._computed(method)
        arrow = self.arrow(method)
        if not method.residual:
            return arrow
        remainder = remainder_of(method, self.inputs.sequence.num_vision)
        lacked = [self.memory.residuals.get((head, remainder)) for head in range(self.inputs.heads)]
        if any(one is None for one in lacked):
            return None
        return arrow + torch.stack([one.to(q.device, q.dtype) for one in lacked if one is not None], dim=2)

    def arrow(self, method: Method) -> Tensor:
        """Return the arrow of a method in all heads."""
        key = remainder_of(method, self.inputs.sequence.num_vision)
        if key not in self._arrows:
            self._arrows[key] = self._computed(method)
        return self._arrows[key]

    def _computed(self, method: Method) -> Tensor:
        sequence = self.inputs.sequence
        window = window_of(method, self._config, sequence.num_vision, sequence.num_text, sequence.text_first)
        reorder = method.reorder and window > 0
        launch = Launch((window,) * self.inputs.heads, reorder, method.shares_guidance)
        return compute((launch,), self.inputs, None, self._config)


class Calibration(HeadwiseRun):
    """Computes every method of every head, chooses, and goes on with what was chosen."""

    def __init__(
        self, view: DenoiserView, pipeline: Any, config: DiTFastAttnV2Config, num_steps: int, checkpoint: Checkpoint,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        super().__init__(view, pipeline, config)
        self.num_steps = num_steps
        self.checkpoint = checkpoint
        self.layout: Layout | None = None
        self.guidance = "none"
        self._methods = config.parsed_methods()
        self._progress = progress
        self._step = -1

    def _new_run(self) -> None:
        if self._step >= 0:
            raise CalibrationError(
                "the denoising began anew: a plan is made in one run, so pass all prompts as one batch"
            )
        super()._new_run()

    def prepare(self, call: Call) -> None:
        if call.num_steps is not None and call.num_steps != self.num_steps:
            raise ConfigError(
                f"num_inference_steps = {self.num_steps} is not valid: this run makes {call.num_steps} evaluations",
                "num_inference_steps",
            )
        if self.layout is None:
            self._check(call)
        if call.layout.num_vision != (self.layout or call.layout).num_vision:
            raise CalibrationError("the resolution changed during calibration")
        self.layout = call.layout
        self.guidance = "batched" if call.batched else "separate" if call.branch == "uncond" else self.guidance
        if call.step > self._step:
            if self._step >= 0:
                self.checkpoint.save()
            self._step = call.step
            if self._progress is not None:
                self._progress(call.step, self.num_steps)

    def run_site(self, hook: Hook, call: Call, inputs: Inputs) -> Tensor:
        memory = self.memory.of(call.branch, hook.index)
        full = full_attention(replace(inputs, dense=None))
        if not bool(full.isfinite().all()):
            raise CalibrationError(
                f"step {call.step}, layer {hook.site.name}: the attention output has NaN or infinity"
            )
        letters = self.checkpoint.letters(call.branch, call.step, hook.index)
        candidates = Candidates(inputs, memory, self.config, reuse=self.num_steps >= self.config.min_cache_steps)
        if letters is None:
            letters = FULL_LETTER * inputs.heads
            if self.config.first_full_steps <= call.step < self.num_steps - self.config.last_full_steps:
                outputs = [candidates.output(method) for method in self._methods]
                letters = self._choose(hook, call, inputs.sequence, full, outputs)
            self.checkpoint.record(call.branch, call.step, hook.index, letters)
        out = full.clone()
        for letter in set(letters) - {FULL_LETTER}:
            heads = [head for head, own in enumerate(letters) if own == letter]
            output = candidates.output(self._methods[LETTERS.index(letter)])
            if output is None:
                raise CalibrationError(f"step {call.step}: the checkpoint reuses outputs that this run does not have")
            put(out, heads, pick(output, heads))
        self._remember(candidates, letters, full, out)
        return out

    def _check(self, call: Call) -> None:
        """Raise `ConfigError` for methods that cannot run on these tokens."""
        for method in self._methods:
            method.window(call.layout.num_vision)
            if method.reorder and call.layout.frames == 1:
                raise ConfigError(f"methods: {method.name!r} is not valid: there is one frame", "methods")
            if method.shares_guidance and not call.batched:
                raise ConfigError(
                    f"methods: {method.name!r} is not valid: the guidance branches are not in one batch", "methods"
                )

    def _choose(
        self, hook: Hook, call: Call, sequence: Tokens, full: Tensor, candidates: Sequence[Tensor | None]
    ) -> str:
        """Return a letter for each head, and note the errors of what was chosen."""
        heads = full.shape[2]
        unavailable = torch.full((heads,), torch.inf)
        rse = torch.stack(
            [unavailable if one is None else head_rse(one, full).double().cpu() for one in candidates], dim=1
        )
        if bool(rse.isnan().any()):
            raise CalibrationError(f"step {call.step}, layer {hook.site.name}: a method gave NaN")
        saving = torch.tensor([method.saving(sequence.num_vision, sequence.num_text) for method in self._methods])
        chosen = self.decide(rse, saving.double())
        letters = "".join(FULL_LETTER if method < 0 else LETTERS[method] for method in chosen)
        tokens = (sequence.num_vision, sequence.num_text, sequence.text_first)
        if density_of(letters, self.config, *tokens) > self.config.dense_above:
            chosen, letters = [-1] * heads, FULL_LETTER * heads
        errors = [float(rse[head, method]) if method >= 0 else 0.0 for head, method in enumerate(chosen)]
        self.checkpoint.note_errors(hook.index, errors)
        return letters

    def decide(self, rse: Tensor, saving: Tensor) -> list[int]:
        """Return the method of each head, -1 for full, from errors (heads, methods) and savings (methods)."""
        chosen: list[int] = solve_head_plan(rse, saving, self.config.delta, self.config.coef).tolist()
        return chosen

    def _remember(self, candidates: Candidates, letters: str, full: Tensor, out: Tensor) -> None:
        memory = candidates.memory
        if any(method.kind == "cached" for method in self._methods):
            memory.keep(out, tuple(range(len(letters))), self.config)
        heads = [head for head, letter in enumerate(letters) if letter == FULL_LETTER]
        for method in self._methods:
            if method.residual and heads:
                lacked = full - candidates.arrow(method)
                remainder = remainder_of(method, candidates.inputs.sequence.num_vision)
                for head in heads:
                    memory.residuals[head, remainder] = stored(lacked[:, :, head], full, self.config)

    def plan(self, *, height: int | None, width: int | None, scheduler: str | None) -> Plan:
        """Return the plan of the finished run; raises `CalibrationError` when the denoiser was never called."""
        if self.layout is None:
            raise CalibrationError("the denoiser was not called: nothing to make a plan of")
        layers = [
            LayerPlan(hook.site.name, heads_of(hook.site), hook.site.text, *self.checkpoint.errors(hook.index))
            for hook in self.hooks
        ]
        plan = Plan(
            model=type(self.view.model).__name__,
            model_digest=digest_of(self.view.model),
            layers=tuple(layers),
            num_vision=self.layout.num_vision,
            num_text=self.layout.num_text,
            num_steps=self.num_steps,
            config=self.config,
            choices=self.checkpoint.choices(self.num_steps, [layer.heads for layer in layers]),
            guidance=self.guidance,  # type: ignore[arg-type]
            frames=self.layout.frames,
            height=height,
            width=width,
            scheduler=scheduler,
            versions={name: version(name) for name in ("torch", "diffusers", "ditfastattn2")},
        )
        return plan.replace(density=plan.kept())


def calibrate(
    pipe_or_step_fn: Any,
    prompts: Sequence[str],
    config: DiTFastAttnV2Config | None = None,
    *,
    num_inference_steps: int,
    height: int | None = None,
    width: int | None = None,
    generator: torch.Generator | None = None,
    denoiser: Any = None,
    checkpoint: Path | str | None = None,
    progress: Progress | None = None,
    kind: type[Calibration] = Calibration,
    **call: Any,
) -> Plan:
    """Make a plan from one batch of prompts, at the resolution and number of steps it is for (section 3.4).

    `pipe_or_step_fn` is a pipeline, called once with the prompts and `call` (`guidance_scale`, `num_frames` ...); or a
    function that takes the prompts and runs the denoising itself, with `denoiser` the transformer that it calls.
    `checkpoint` is a file written after every step; an interrupted calibration with the same arguments goes on from it,
    which needs a `generator`. `progress(step, num_steps)` is called when a step begins. `kind` is a subclass of
    `Calibration` that decides in another way.

    The model is restored at the end, also after an error. Raises `ConfigError` for arguments that do not fit,
    `UnsupportedModelError`, `GradientError`, `ConflictError` as `apply` does, `CalibrationError` naming step and layer
    of an output that is not finite.
    """
    config = DiTFastAttnV2Config() if config is None else config
    if not isinstance(config, DiTFastAttnV2Config):
        raise ConfigError(f"config = {config!r} is not valid: a DiTFastAttnV2Config", "config")
    config.check(bool(prompts) and not isinstance(prompts, str), "prompts", prompts, "a list of at least one prompt")
    forced = config.first_full_steps + config.last_full_steps
    config.check(
        forced < num_inference_steps, "num_inference_steps", num_inference_steps, f"more than the {forced} full steps"
    )
    if checkpoint is not None and generator is None:
        raise ConfigError(
            "generator = None is not valid: with a checkpoint the noise must be the same again", "generator"
        )
    is_function = denoiser is not None
    view = view_of(denoiser if is_function else pipe_or_step_fn)
    if not is_function and view.model is pipe_or_step_fn:
        raise ConfigError(
            "pipe_or_step_fn is a transformer, which cannot run the denoising: pass its pipeline, or a function and "
            "denoiser=transformer",
            "pipe_or_step_fn",
        )
    if view.model.training:
        raise GradientError(f"{type(view.model).__name__} is in training mode: call .eval() first")
    pipeline = None if is_function else pipe_or_step_fn
    arguments = {name: value for name, value in (("height", height), ("width", width)) if value is not None} | call
    record = Checkpoint(
        Path(checkpoint) if checkpoint is not None else None,
        _digest(view, prompts, config, num_inference_steps, generator, arguments),
    )
    run = kind(view, pipeline, config, num_inference_steps, record, progress)
    with Patch(OWNER) as patch:
        try:
            run.install(patch)
            with torch.no_grad():
                if is_function:
                    pipe_or_step_fn(list(prompts))
                else:
                    arguments |= {"generator": generator, "num_inference_steps": num_inference_steps}
                    pipe_or_step_fn(prompt=list(prompts), output_type="latent", **arguments)
        finally:
            patch.remove()
    record.save()
    scheduler = type(pipeline.scheduler).__name__ if pipeline is not None else None
    return run.plan(height=height, width=width, scheduler=scheduler)


def _digest(
    view: DenoiserView,
    prompts: Sequence[str],
    config: DiTFastAttnV2Config,
    num_steps: int,
    generator: torch.Generator | None,
    arguments: dict[str, Any],
) -> str:
    plain = {name: value for name, value in arguments.items() if isinstance(value, str | int | float | bool)}
    seed = None if generator is None else generator.initial_seed()
    parts = [digest_of(view.model), list(prompts), config.to_dict(), num_steps, seed, plain]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
