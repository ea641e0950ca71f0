"""State of the runs of one patched denoiser: predictions, stored features, token plans. Nothing here is global."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from pared_hooks import StepClock, StepState
from torch import Tensor

from dato.config import DaToConfig
from dato.functional import FULL, TokenPlan
from dato.policy import PRESET_CALLS, Policy
from dato.stats import Statistics

Timestep = Tensor | float | int


@dataclass
class StoredPlan:
    """The token plan of a block and the number of pruned calls it has served."""

    plan: TokenPlan
    age: int = 1


@dataclass
class Memory:
    """What the calls of one run leave for the later ones; separate guidance calls have one each."""

    signature: tuple[object, ...] | None = None
    """Shape, dtype and device of the sample that everything here was made from."""
    features: dict[int, Tensor] = field(default_factory=dict)
    """By depth k: the tensor that a call of depth k takes in place of everything deeper."""
    latest: Tensor | None = None
    """Prediction of the latest call that computed something."""
    before: Tensor | None = None
    """The prediction before `latest`; the dynamics score is their difference."""
    standing: bool = False
    """Whether the last two calls had the same prediction (`diff_update="every"` after a skipped call)."""
    plans: dict[str, StoredPlan] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        held = [*self.features.values(), *(t for t in (self.latest, self.before) if t is not None)]
        for stored in self.plans.values():
            plan = stored.plan
            held += [plan.keep_idx, plan.prune_idx, plan.source_pos, plan.gather_map]
        return held


@dataclass
class Call:
    """One denoiser call in progress: what it computes, and what its blocks share."""

    index: int
    depth: int
    ratio: float
    memory: Memory
    sample: Tensor
    seed: int
    ends: str | None = None
    """The guidance branch whose run ends with this call."""
    protect: bool = False
    """Whether the model changes hidden states in place, so that stored features must be copies."""
    pending: dict[str, TokenPlan] = field(default_factory=dict)
    """By block: the plan between its normalisation and its attention."""
    shared: dict[tuple[int, int], TokenPlan] = field(default_factory=dict)
    """By token grid: the plan of the first pruned block, for `share_match`."""
    dynamics: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By token grid: the dynamics score."""
    _placeholder: Tensor | None = None

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latent."""
        return self.sample.shape[-2], self.sample.shape[-1]

    @property
    def placeholder(self) -> Tensor:
        """A `(1, 1, 1, 1)` zero that stands for skip connections nobody reads: concatenating or adding it is free."""
        if self._placeholder is None:
            self._placeholder = self.sample.new_zeros(1, 1, 1, 1)
        return self._placeholder

    def computes(self, unit: int) -> bool:
        """Whether unit `unit` is computed at this call."""
        return self.depth == FULL or unit < self.depth

    def store(self, depth: int, feature: Tensor) -> None:
        """Keep the tensor that a later call of depth `depth` starts from."""
        feature = feature.detach()
        self.memory.features[depth] = feature.clone() if self.protect else feature

    def stored(self) -> Tensor:
        """The stored tensor that stands for everything deeper than this call computes."""
        feature = self.memory.features[self.depth]
        return feature.clone() if self.protect else feature


class RunState:
    """Decides what each denoiser call does and keeps what later calls of the same run reuse."""

    def __init__(
        self,
        config: DaToConfig,
        clock: StepClock,
        statistics: Statistics,
        *,
        has_pipeline: bool,
        depths: frozenset[int],
    ) -> None:
        self.config = config
        self.clock = clock
        self.statistics = statistics
        self.depths = depths
        """Depths of at least 1 that the policy uses: the features worth storing."""
        self.call: Call | None = None
        self._has_pipeline = has_pipeline
        self._memories: dict[str, Memory] = {}
        self._ahead: StepState | None = None
        self._policy: Policy | None = None
        self._seed = 0
        self._warned: set[str] = set()
        self._forget: list[Callable[[], None]] = []
        self._nonfinite: Tensor | None = None
        clock.on_new_run(self.forget)

    def foresee(self, sample: Tensor, timestep: Timestep) -> int:
        """Planned depth of the denoiser call that follows with this very `timestep` (for what runs before it)."""
        self._ahead = self.clock.tick(sample, timestep)
        policy = self._policy_of_run()
        return policy.depth[min(self._ahead.call, policy.num_calls - 1)]

    def begin(self, sample: Tensor, timestep: Timestep, needs_full: str | None = None) -> Call | None:
        """Start a denoiser call and say what it computes; None for a call that is no part of the schedule.

        `needs_full` is a reason to compute everything whatever the policy says.
        """
        self.statistics.start(sample.device)
        ahead, self._ahead = self._ahead, None
        step = ahead if ahead is not None and ahead.timestep is timestep else self.clock.tick(sample, timestep)
        if step.branch == "extra":
            return None
        policy = self._policy_of_run()
        index = min(step.call, policy.num_calls - 1)
        # The clock calls the first branch "both" until it has seen a second one.
        branch = "cond" if step.branch == "both" else step.branch
        memory = self._memories.setdefault(branch, Memory())
        depth = policy.depth[index]
        signature = (tuple(sample.shape), sample.dtype, sample.device)
        if memory.signature not in (None, signature):
            self.warn_once(
                "signature",
                f"the latent changed from {memory.signature} to {signature} in the middle of a run "
                "(guidance switched off?); this call computes everything",
            )
            memory = self._memories[branch] = Memory()
        if needs_full is not None:
            if depth != FULL:
                self.warn_once("needs_full", needs_full)
            depth = FULL
        elif (depth == 0 and memory.latest is None) or (depth > 0 and depth not in memory.features):
            depth = FULL
        memory.signature = signature
        is_last = index == policy.num_calls - 1
        self.call = Call(index, depth, policy.ratio[index], memory, sample, self._seed, branch if is_last else None)
        return self.call

    def finish(self, call: Call, prediction: Tensor | None) -> None:
        """Note the prediction of a call; None for a skipped call, whose prediction is the one before."""
        memory = call.memory
        if prediction is None:
            memory.standing = self.config.diff_update == "every"
        else:
            memory.before, memory.latest, memory.standing = memory.latest, prediction.detach().clone(), False
            self._check_finite(memory.latest)
        self.statistics.finish(call, self.num_bytes)
        if call.ends is not None:
            self._memories.pop(call.ends, None)
            self.statistics.note_memory(self.num_bytes)
        self.call = None

    def fail(self) -> None:
        """After an error inside the denoiser: the next call starts a new run."""
        self.clock.reset()
        self.forget()

    def forget(self) -> None:
        """Drop everything that a run has made; the next call is FULL."""
        self.call = None
        self._ahead = None
        self._memories.clear()
        self.statistics.note_memory(0)
        self._policy = None
        self._seed = secrets.randbits(62) if self.config.seed is None else self.config.seed
        for function in self._forget:
            function()

    def on_forget(self, function: Callable[[], None]) -> None:
        """Call `function` whenever the run's state is dropped."""
        self._forget.append(function)

    def warn_once(self, key: str, message: str) -> None:
        """Warn at most once per `key` and handle."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"dato: {message}", stacklevel=3)

    @property
    def num_bytes(self) -> int:
        """Bytes held by the stores."""
        return sum(tensor.nbytes for memory in self._memories.values() for tensor in memory.tensors())

    def _policy_of_run(self) -> Policy:
        if self._policy is None:
            given, num_calls = self.config.policy, self.clock.num_calls
            if num_calls is None:
                num_calls = given.num_calls if isinstance(given, Policy) else PRESET_CALLS
            if not self._has_pipeline and isinstance(given, Policy) and given.num_calls == num_calls:
                # Written for exactly these calls: nothing to resample, and no rule for short runs.
                self._policy = replace(given, depth=(FULL, *given.depth[1:]))
            else:
                first_call = self.clock.first_call
                self._policy = self.config.policy_for(num_calls + first_call, first_call)
        return self._policy

    def _check_finite(self, prediction: Tensor) -> None:
        finite = torch.isfinite(prediction).all()
        if prediction.device.type == "cpu":
            if not finite:
                self._warn_nonfinite()
            return
        # Reading a GPU flag would wait for the call; `report_nonfinite` reads it when somebody waits anyway.
        self._nonfinite = ~finite if self._nonfinite is None else self._nonfinite | ~finite

    def report_nonfinite(self) -> None:
        """Warn if a prediction of an earlier call on a GPU was not finite."""
        if self._nonfinite is not None and bool(self._nonfinite):
            self._warn_nonfinite()
        self._nonfinite = None

    def _warn_nonfinite(self) -> None:
        self.warn_once("nonfinite", "a prediction holds NaN or inf; its dynamics score counts as 0 there")
