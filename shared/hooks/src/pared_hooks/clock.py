"""`StepClock`: which denoising step, call and guidance branch a denoiser is being called for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pared_hooks._schedule import (
    Schedule,
    Timestep,
    branch_of_context,
    guidance_of,
    scalar,
    scheduler_of,
    shape_of,
)
from pared_hooks.errors import ConfigError
from pared_hooks.patch import Patch


@dataclass(frozen=True)
class StepState:
    """Where a denoiser call is.

    `run` counts passes over the timesteps. `call` counts the evaluations of a run: the entries of
    `scheduler.timesteps`, so a conditional and an unconditional forward for the same entry share it. `step` counts
    the sampler's steps: a Heun step has two calls. `first_call` is the entry at which the run started (img2img).
    """

    run: int
    call: int
    num_calls: int | None
    step: int
    num_steps: int | None
    branch: str
    timestep: Timestep
    first_call: int = 0
    new_run: bool = False


class StepClock:
    """Tells denoising steps apart for a method that is applied to a denoiser.

    With a pipeline (or a scheduler) the clock reads where the scheduler is; it changes neither. Without one it goes by
    the timesteps alone: a lower one is the next call, a repeated one the other guidance branch if the first timestep
    of the run was repeated too, and a higher one, or the end of `num_calls`, a new run.

    `calls_per_step` is the number of denoiser forwards for one evaluation: 1 when guidance is batched or off, 2 when
    the pipeline calls the branches one after the other. None, the default, finds it out during the first evaluation.
    """

    def __init__(self, pipeline: Any = None, *, calls_per_step: int | None = None) -> None:
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self.calls_per_step = calls_per_step
        self.branch_order: Sequence[str] = ("cond", "uncond")
        self.state: StepState | None = None
        self._run = -1
        self._expected_calls: int | None = None
        self._expected_steps: int | None = None
        self._learned: dict[bool | None, int] = {}
        self._new_run: list[Callable[[], None]] = []
        self._shape_change: list[Callable[[Sequence[int], Sequence[int]], None]] = []
        self._schedule: Schedule | None = None
        self._shape: tuple[int, ...] = ()
        # Reading a scheduler is plain Python; inside a compiled denoiser it stays outside the graph.
        self._advance = torch.compiler.disable(self._advance_eagerly)
        self.reset()

    @property
    def calls_per_step(self) -> int | None:
        """Denoiser forwards for one evaluation, as given; None when the clock finds out by itself."""
        return self._calls_per_step

    @calls_per_step.setter
    def calls_per_step(self, value: int | None) -> None:
        _check_count("calls_per_step", value)
        self._calls_per_step = value

    @property
    def run(self) -> int:
        """Number of the current run; -1 before the first."""
        return self._run

    @property
    def call(self) -> int:
        """Number of the current evaluation within the run, from 0."""
        return self._now().call

    @property
    def num_calls(self) -> int | None:
        """Evaluations of the current run; None without a scheduler unless `start_run` said it."""
        return self.state.num_calls if self.state is not None else self._expected_calls

    @property
    def first_call(self) -> int:
        """Entry of `scheduler.timesteps` at which the run started: above 0 for img2img."""
        return self.state.first_call if self.state is not None else 0

    @property
    def step(self) -> int:
        """Number of the current sampler step within the run, from 0."""
        return self._now().step

    @property
    def num_steps(self) -> int | None:
        """Sampler steps of the current run; None when unknown."""
        return self.state.num_steps if self.state is not None else self._expected_steps

    @property
    def branch(self) -> str:
        """ "cond", "uncond", "both" (a batch of both, or unknown), or the name the pipeline gives the forward."""
        return self._now().branch

    @property
    def timestep(self) -> Timestep:
        """Timestep of the current call, as the denoiser got it."""
        return self._now().timestep

    def on_new_run(self, function: Callable[[], None]) -> None:
        """Call `function()` at the first denoiser call of every run."""
        self._new_run.append(function)

    def on_shape_change(self, function: Callable[[Sequence[int], Sequence[int]], None]) -> None:
        """Call `function(old_shape, new_shape)` when the denoiser's input changes shape in the middle of a run."""
        self._shape_change.append(function)

    def start_run(self, num_calls: int | None = None, num_steps: int | None = None) -> None:
        """Let the next denoiser call start a run; without a scheduler this one and later runs have `num_calls` calls.

        Raises `ConfigError` for counts below 1.
        """
        _check_count("num_calls", num_calls)
        _check_count("num_steps", num_steps)
        self._expected_calls, self._expected_steps = num_calls, num_steps
        self.reset()

    def reset(self) -> None:
        """Forget the current run; the next denoiser call starts a new one."""
        self.state = None
        self._fresh = True
        self._start = self._position = self._forwards = 0
        self._value: float | None = None

    def tick(
        self, sample: Any, timestep: Timestep, *, branch: str | None = None, step_index: int | None = None
    ) -> StepState:
        """Note a denoiser call and return where it is; once per forward of the denoiser.

        `sample` is the denoiser's input (its shape is watched), `timestep` what the denoiser got: a number or a tensor
        of any shape. `branch` and `step_index` are for callers that know better than the clock.
        """
        return self._advance(sample, timestep, branch, step_index)

    def attach(self, patch: Patch, denoiser: nn.Module, timestep_name: str = "timestep") -> None:
        """Tick at every call of `denoiser`, before any forward wrapper runs, until `patch` is removed.

        On models with `cache_context` the name that the pipeline sets there tells the branch.
        """
        context = _ContextReader.install(patch, denoiser) if hasattr(denoiser, "cache_context") else None
        names = _parameter_names(denoiser)
        if timestep_name not in names:
            raise ConfigError(f"timestep_name = {timestep_name!r} is not valid: one of {', '.join(names)}")

        def tick(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            branch, step_index = context() if context is not None else (None, None)
            self.tick(given[names[0]], given[timestep_name], branch=branch, step_index=step_index)

        patch.add_hook(denoiser, "forward_pre", tick, with_kwargs=True, prepend=True)

    def _now(self) -> StepState:
        if self.state is None:
            raise ConfigError("the clock has not seen a denoiser call yet")
        return self.state

    def _advance_eagerly(
        self, sample: Any, timestep: Timestep, branch: str | None, step_index: int | None
    ) -> StepState:
        pipeline = self._pipeline() if self._pipeline is not None else None
        guided = guidance_of(pipeline)
        shape = shape_of(sample)
        # A second forward with a smaller batch is no guidance branch but SD3's skip-layer guidance, say.
        shrunk = branch is None and shape[:1] < self._shape[:1]
        expected = self._calls_per_step or self._learned.get(guided)
        full = expected is not None and self._forwards >= expected and not shrunk
        new_run, position = self._locate(pipeline, timestep, step_index, full)
        if not new_run and position > self._position and self._position == self._start:
            self._learned[guided] = self._forwards
        if new_run:
            self._run += 1
            self._start, self._forwards = position, 0
        elif position != self._position:
            self._forwards = 0
        extra = shrunk and self._forwards > 0
        self._position = position
        if branch is None:
            branch = "extra" if extra else self._branch(guided)
        self._forwards += not extra
        self.state = self._describe(pipeline, branch, timestep, new_run)
        changed = shape != self._shape and not new_run and not extra
        before, self._shape = self._shape, shape if not extra else self._shape
        for announce in self._new_run if new_run else ():
            announce()
        for report in self._shape_change if changed else ():
            report(before, shape)
        return self.state

    def _locate(self, pipeline: Any, timestep: Timestep, step_index: int | None, full: bool) -> tuple[bool, int]:
        """Return whether a run starts with this call, and the position of the call."""
        scheduler = scheduler_of(pipeline)
        timesteps = getattr(scheduler, "timesteps", None)
        fresh, self._fresh = self._fresh, False
        if not isinstance(timesteps, Tensor) or timesteps.numel() == 0:
            self._schedule = None
            return self._locate_by_value(fresh, timestep, full)
        if self._schedule is None or timesteps is not self._schedule.timesteps:
            self._schedule, fresh = Schedule(scheduler, timesteps), True
        schedule = self._schedule
        position = schedule.position_of_view(timestep)
        if position is None:
            position = schedule.position_of_view(getattr(pipeline, "_current_timestep", None))
        if position is None and step_index is not None and not fresh:
            position = min(self._start + step_index, len(schedule) - 1)
        if position is None:
            position = schedule.position_of_scheduler(None if fresh else self._start)
        if fresh:
            # Only schedulers that do not count their steps are followed by the values alone.
            self._value = scalar(timestep) if position is None else None
            if position is None:
                position = schedule.first_position(timestep, getattr(pipeline, "_num_timesteps", None))
            return True, position
        if position is None:
            value = scalar(timestep)
            same, self._value = value == self._value, value
            position = schedule.next_position(self._position, timestep, same, full)
        single = self._start == len(schedule) - 1 and position == self._start
        return position < self._position or (single and full), position

    def _locate_by_value(self, fresh: bool, timestep: Timestep, full: bool) -> tuple[bool, int]:
        value, before = scalar(timestep), self._value
        self._value = value
        if fresh or before is None or value > before:
            return True, 0
        if value == before and not full:
            return False, self._position
        position = self._position + 1
        return (True, 0) if position == self._expected_calls else (False, position)

    def _branch(self, guided: bool | None) -> str:
        forwards = self._calls_per_step or self._learned.get(guided)
        if self._forwards == 0 and (forwards is None or forwards == 1):
            return "cond" if guided is False else "both"
        if self._forwards < len(self.branch_order):
            return self.branch_order[self._forwards]
        return "extra"

    def _describe(self, pipeline: Any, branch: str, timestep: Timestep, new_run: bool) -> StepState:
        schedule, start = self._schedule, self._start
        call = self._position - start
        num_calls, num_steps, step = self._expected_calls, self._expected_steps, call
        if schedule is not None:
            num_calls = len(schedule) - start
            announced = getattr(pipeline, "_num_timesteps", None)
            # SDXL's `denoising_end` leaves out the end of the list.
            if announced is not None and getattr(pipeline, "denoising_end", None):
                num_calls = min(num_calls, announced)
            step = schedule.step(self._position) - schedule.step(start)
            num_steps = schedule.step(start + num_calls - 1) - schedule.step(start) + 1
        elif num_steps is None:
            num_steps = num_calls
        elif num_calls is not None:
            step = call * num_steps // num_calls
        return StepState(self._run, call, num_calls, step, num_steps, branch, timestep, start, new_run)


class _ContextReader:
    """Reads what a pipeline tells the denoiser through `cache_context`."""

    @staticmethod
    def install(patch: Patch, denoiser: nn.Module) -> Callable[[], tuple[str | None, int | None]]:
        from diffusers.hooks import ModelHook
        from diffusers.hooks.hooks import BaseState, StateManager

        class Nothing(BaseState):
            def reset(self, *args: Any, **kwargs: Any) -> None:
                pass

        class Listener(ModelHook):
            _is_stateful = True

            def __init__(self) -> None:
                super().__init__()
                self.manager = StateManager(Nothing)  # type: ignore[arg-type]

            def reset_state(self, module: nn.Module) -> nn.Module:
                return module

        listener = Listener()
        patch.add_model_hook(denoiser, listener, f"pared.clock.{patch.owner}.{id(listener)}", root=denoiser)

        def read() -> tuple[str | None, int | None]:
            context = listener.manager._context
            if context is None:
                return None, None
            if isinstance(context, str):
                return branch_of_context(context), None
            return branch_of_context(context.name), context.step_index

        return read


def _parameter_names(module: nn.Module) -> list[str]:
    code = type(module).forward
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    return list(code.__code__.co_varnames[1 : code.__code__.co_argcount])


def _check_count(field: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{field} = {value!r} is not valid: an integer >= 1", field)
