"""Where in a scheduler's list of timesteps a denoiser call is, read without changing pipeline or scheduler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Timestep = Tensor | float | int


class Schedule:
    """One pass over `scheduler.timesteps`: a new `set_timesteps` makes a new tensor, and so a new `Schedule`."""

    def __init__(self, scheduler: Any, timesteps: Tensor) -> None:
        self.scheduler = scheduler
        self.timesteps = timesteps
        self.order = int(getattr(scheduler, "order", 1))
        # The one wait for the device per run.
        self.values: list[float] = [float(value) for value in timesteps.tolist()]
        changes = [index > 0 and self.values[index] != self.values[index - 1] for index in range(len(self.values))]
        self._step_of = [sum(changes[: index + 1]) for index in range(len(changes))]

    def __len__(self) -> int:
        return len(self.values)

    def step(self, position: int) -> int:
        """Sampler step that the entry belongs to.

        A scheduler of higher order evaluates `order` consecutive entries per step; PNDM, of order 1, lists the
        timestep it evaluates twice in the same step two times in a row.
        """
        return position // self.order if self.order > 1 else self._step_of[position]

    def position_of_view(self, timestep: Timestep | None) -> int | None:
        """Position of a timestep that is still an element (or expanded element) of `scheduler.timesteps` itself."""
        if not isinstance(timestep, Tensor) or timestep.numel() == 0:
            return None
        if timestep.device != self.timesteps.device or timestep.dtype != self.timesteps.dtype:
            return None
        if timestep.ndim and any(
            stride and size > 1 for stride, size in zip(timestep.stride(), timestep.shape, strict=True)
        ):
            return None
        if timestep.untyped_storage().data_ptr() != self.timesteps.untyped_storage().data_ptr():
            return None
        stride = self.timesteps.stride(0) or 1
        position, rest = divmod(int(timestep.storage_offset() - self.timesteps.storage_offset()), int(stride))
        return position if rest == 0 and 0 <= position < len(self) else None

    def position_of_scheduler(self, start: int | None) -> int | None:
        """Position that the scheduler itself is at; None when it does not count or has not started to."""
        index = getattr(self.scheduler, "_step_index", None)
        if index is not None:
            return min(int(index), len(self) - 1)
        if start is None:
            begin = getattr(self.scheduler, "_begin_index", None)
            return None if begin is None else min(int(begin), len(self) - 1)
        if hasattr(self.scheduler, "_step_index"):
            # Schedulers that start to count in their first `step`.
            return start
        counter = getattr(self.scheduler, "counter", None)
        return min(start + counter, len(self) - 1) if isinstance(counter, int) else None

    def first_position(self, timestep: Timestep, num_timesteps: int | None) -> int:
        """Position of the first call of a run, from the value of its timestep."""
        matches = self.matches(timestep)
        announced = len(self) - num_timesteps if num_timesteps is not None else None
        if announced in matches:
            return int(announced)  # type: ignore[arg-type]
        return matches[0] if matches else 0

    def matches(self, timestep: Timestep) -> list[int]:
        """Positions whose timestep has this value, up to the rounding of a half-precision cast."""
        value = scalar(timestep)
        tolerance = 1e-3 + abs(value) * (1e-6 if not isinstance(timestep, Tensor) else _precision(timestep.dtype))
        nearest = min((abs(entry - value) for entry in self.values), default=math.inf)
        if nearest > tolerance:
            return []
        return [index for index, entry in enumerate(self.values) if abs(entry - value) <= nearest]

    def next_position(self, position: int, timestep: Timestep, same: bool, full: bool) -> int:
        """Position of a call by its timestep alone, given the last one.

        `same`: the timestep equals the last call's; `full`: all branches of the last position have been seen.
        """
        matches = self.matches(timestep)
        if not matches:
            return position if same and not full else min(position + 1, len(self) - 1)
        later = [match for match in matches if match > position]
        if position in matches and not (full and later):
            return position
        return later[0] if later else matches[0]


def scheduler_of(pipeline: Any) -> Any:
    """Return the scheduler of a pipeline, a scheduler itself, or None."""
    if pipeline is None:
        return None
    scheduler = getattr(pipeline, "scheduler", None)
    return scheduler if scheduler is not None else pipeline if hasattr(pipeline, "timesteps") else None


def scalar(timestep: Timestep) -> float:
    """Value of a timestep: a number, one element, or the largest of a batch or of per-token values."""
    if isinstance(timestep, Tensor):
        return float(timestep.detach().max())
    return float(timestep)


def guidance_of(pipeline: Any) -> bool | None:
    """Whether the pipeline uses classifier-free guidance now; None when it cannot be told."""
    for name in ("do_classifier_free_guidance", "do_true_cfg"):
        try:
            value = getattr(pipeline, name, None)
        except (AttributeError, TypeError):
            # The property reads attributes that only a call of the pipeline sets.
            continue
        if isinstance(value, bool):
            return value
    return None


def branch_of_context(name: str) -> str:
    """Branch for the name a pipeline gives to `cache_context`."""
    name = name.removeprefix("pred_")
    return "both" if name in ("cond_uncond", "uncond_cond") else name


def _precision(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 1e-6


def shape_of(sample: Any) -> tuple[int, ...]:
    """Shape of the denoiser's input, or of the first of a list of inputs."""
    while isinstance(sample, list | tuple) and sample:
        sample = sample[0]
    return tuple(sample.shape) if isinstance(sample, Tensor) else ()
