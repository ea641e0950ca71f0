"""`apply`: run a diffusers pipeline or denoiser by a plan, and the handle that it returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pared_hooks import ConfigError, Handle, Patch
from pared_kernels import BackendUnavailableError, dispatch

from ditfastattn2.adapters.base import view_of
from ditfastattn2.errors import GradientError
from ditfastattn2.plan import Plan
from ditfastattn2.replay import Replay

OWNER = "ditfastattn2"


class DiTFastAttnV2Handle(Handle):
    """A plan at work on one denoiser: statistics, per-run state, removal."""

    def __init__(self, patch: Patch, replay: Replay, plan: Plan) -> None:
        super().__init__(patch)
        self.plan = plan
        self._replay = replay

    def stats(self) -> dict[str, Any]:
        """What was done since the last reset.

        "calls" of the denoiser; "attention_flops" {"full", "computed"}, "removed" and "removed_by_layer" as shares;
        "cache_misses" (heads computed in full because nothing was there to reuse), "beyond_plan" (calls after the last
        step of the plan), "dense" (calls or layers that ran in full, by reason), "skipped_projections" (layers whose
        heads were all reused), "cache_bytes" now and "peak_cache_bytes".
        """
        return self._replay.statistics.as_dict(self._replay.memory.num_bytes)

    def reset(self) -> None:
        """Forget the current run, its caches, and all statistics; the next call starts a run."""
        self._replay.clock.reset()
        self._replay.forget()
        self._replay.statistics.reset()


def apply(
    pipe_or_transformer: Any, plan: Plan, *, strict: bool = True, allow_grad: bool = False
) -> DiTFastAttnV2Handle:
    """Compress the attention of a diffusers pipeline, or of a transformer itself, by `plan` (section 3.5).

    `strict` False lets windows follow another resolution and choices another number of steps, as `Plan.retarget` does.
    With `allow_grad`, calls that need gradients run in full instead of raising.

    Raises `UnsupportedModelError` for an unknown class or processor, for a pipeline of two denoisers (apply to each of
    them) and for parallelism, `PlanMismatch` listing what differs, `GradientError` (a `RuntimeError`) for a model in
    training mode, `AlreadyAppliedError` at a second call, `ConflictError` beside a cache that replaces outputs of
    attention, `BackendUnavailableError` (a `RuntimeError`). When it raises, the model is as it was. Calls raise
    `PlanMismatch` for another resolution or fewer steps.
    """
    if not isinstance(plan, Plan):
        raise ConfigError(f"plan = {plan!r} is not valid: a ditfastattn2.Plan, from calibrate or Plan.load", "plan")
    view = view_of(pipe_or_transformer)
    pipeline = (
        None if getattr(pipe_or_transformer, "_orig_mod", pipe_or_transformer) is view.model else pipe_or_transformer
    )
    if view.model.training and not allow_grad:
        raise GradientError(
            f"{type(view.model).__name__} is in training mode and compressed attention has no backward pass: "
            "call .eval() first, or apply with allow_grad=True"
        )
    if plan.config.backend == "triton" and not dispatch.has_triton():
        raise BackendUnavailableError("backend=\"triton\" needs triton: pip install 'pared-kernels[triton]'")
    replay = Replay(view, pipeline, plan, strict=strict, allow_grad=allow_grad)
    plan.check_model(view, strict=strict)
    with Patch(OWNER) as patch:
        replay.install(patch)
        return DiTFastAttnV2Handle(patch, replay, plan)


@contextmanager
def applied(pipe_or_transformer: Any, plan: Plan, **options: Any) -> Iterator[DiTFastAttnV2Handle]:
    """`apply` for the duration of a `with` block; raises what `apply` raises."""
    with apply(pipe_or_transformer, plan, **options) as handle:
        yield handle
