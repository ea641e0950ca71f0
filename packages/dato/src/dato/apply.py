"""`apply`: put DaTo on a diffusers pipeline or denoiser, and the handle that it returns."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pared_hooks import ConfigError, Handle, Patch, StepClock
from torch import nn

from dato.adapters import controlnet as controlnet_adapter
from dato.adapters.base import DenoiserAdapter, adapter_for, find_denoiser
from dato.backends import hooks
from dato.backends.split import SplitBackend, require_unet
from dato.config import DaToConfig
from dato.costs import UnitCosts, unit_costs
from dato.policy import Policy
from dato.pruning import TokenPruner
from dato.state import RunState
from dato.stats import Statistics

OWNER = "dato"


class DaToHandle(Handle):
    """DaTo applied to one denoiser: statistics, per-run state, removal. `timing` turns on seconds per action."""

    def __init__(
        self, patch: Patch, adapter: DenoiserAdapter, run: RunState, policy: Policy, split: SplitBackend | None
    ) -> None:
        super().__init__(patch)
        self.config = run.config
        self._adapter = adapter
        self._run = run
        self._policy = policy
        self._split = split
        self._known_costs: dict[tuple[int, ...], UnitCosts] = {}

    @property
    def timing(self) -> bool:
        """Whether calls are timed; on a GPU this waits for each call to end."""
        return self._run.statistics.timing

    @timing.setter
    def timing(self, value: bool) -> None:
        self._run.statistics.timing = value

    @property
    def calls_per_step(self) -> int | None:
        """Denoiser calls per evaluation: 2 when guidance branches are called separately; None: found by the clock."""
        return self._run.clock.calls_per_step

    @calls_per_step.setter
    def calls_per_step(self, value: int | None) -> None:
        self._run.clock.calls_per_step = value

    def stats(self) -> dict[str, Any]:
        """What was done since the last reset.

        "calls" by action ("full", "skip", "depth-k"), "tokens_kept" by block, "flops" (estimates: "without_dato",
        "with_dato", "saved_by_cache", "saved_by_skip", "saved_by_pruning", "matching"), "seconds" by action when
        `timing` is on, "memory_bytes" and "peak_memory_bytes" of the stores, "controlnet" calls.
        """
        self._run.report_nonfinite()
        return self._run.statistics.as_dict(self._costs)

    def reset(self) -> None:
        """Forget the current run and all statistics; the next call is FULL."""
        self._run.clock.reset()
        self._run.forget()
        self._run.statistics.reset()

    def _costs(self, sample_shape: tuple[int, ...]) -> UnitCosts:
        if sample_shape not in self._known_costs:
            self._known_costs[sample_shape] = unit_costs(self._adapter.denoiser, sample_shape, self.config)
        return self._known_costs[sample_shape]

    def start_run(self, num_calls: int | None = None) -> None:
        """Say that the next call starts a run of `num_calls` denoiser calls (default: the length of the policy).

        With a pipeline the number of calls is read from its scheduler. Raises `ConfigError` below 1.
        """
        self._run.clock.start_run(num_calls=self._policy.num_calls if num_calls is None else num_calls)
        self._run.forget()

    def compile(self, **torch_compile_kwargs: Any) -> None:
        """Compile the functions of the split backend with `torch.compile`, `fullgraph=True` unless given."""
        if self._split is None:
            raise ConfigError('handle.compile() needs DaToConfig(backend="split")', "backend")
        self._split.compile(torch_compile_kwargs)


def apply(pipe_or_model: Any, config: DaToConfig | None = None) -> DaToHandle:
    """Accelerate the denoiser of a diffusers pipeline, or a denoiser itself, with DaTo (sections 3 and 7).

    Raises `UnsupportedModelError` naming an unknown class, `PolicyError` for a depth the model does not have,
    `ConfigError` for a model in training mode without `allow_grad`, and `AlreadyAppliedError` at a second call. When
    it raises, the model is as it was.
    """
    config = DaToConfig() if config is None else config
    if not isinstance(config, DaToConfig):
        raise ConfigError(f"config = {config!r} is not valid: a DaToConfig", "config")
    denoiser = find_denoiser(pipe_or_model)
    pipe = None if pipe_or_model is denoiser else pipe_or_model
    adapter = adapter_for(denoiser, config.max_downsample)
    policy = config.policy if isinstance(config.policy, Policy) else Policy.from_preset(config.policy)
    policy.check_depth(adapter.num_units)
    if denoiser.training and not config.allow_grad:
        raise ConfigError(
            f"{type(denoiser).__name__} is in training mode and DaToConfig.allow_grad = False: call .eval() first",
            "allow_grad",
        )
    depths = frozenset(depth for depth in policy.depth[1:] if depth >= 1)
    with Patch(OWNER) as patch:
        patch.claim(denoiser, "denoiser.skip")
        clock = StepClock(pipe, calls_per_step=1 if pipe is None else None)
        if pipe is None:
            clock.start_run(num_calls=policy.num_calls)
        run = RunState(config, clock, Statistics(), has_pipeline=pipe is not None, depths=depths)
        pipe_reference = weakref.ref(pipe) if pipe is not None else lambda: None
        pruner = TokenPruner(config, run, lambda: guidance_groups(pipe_reference(), config.cfg_groups))
        prunes = any(policy.ratio)
        split = None
        if config.backend == "split":
            split = SplitBackend(require_unet(adapter), run, pruner, prunes=prunes)
            split.install(patch)
        else:
            hooks.install(patch, adapter, run, pruner, prunes=prunes)
        controlnet = getattr(pipe, "controlnet", None)
        if isinstance(controlnet, nn.Module):
            controlnet_adapter.install(patch, controlnet, run)
        patch.on_remove(run.forget)
        return DaToHandle(patch, adapter, run, policy, split)


@contextmanager
def applied(pipe_or_model: Any, config: DaToConfig | None = None) -> Iterator[DaToHandle]:
    """`apply` for the duration of a `with` block; raises what `apply` raises."""
    with apply(pipe_or_model, config) as handle:
        yield handle


def guidance_groups(pipe: Any, default: int) -> int:
    """Parts of the guidance batch of `pipe`: 1 without guidance, 3 with perturbed attention or an edit image."""
    try:
        guided = pipe.do_classifier_free_guidance
    except (AttributeError, TypeError):
        # No such property, or one that reads what only a call of the pipeline sets.
        return default
    perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    if guided and "InstructPix2Pix" in type(pipe).__name__:
        return 3
    return 1 + bool(guided) + perturbed
