"""`DaToConfig`: every option of the method, validated before any module is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pared_hooks import Config

from dato.policy import PRESET_CALLS, Policy


@dataclass(frozen=True)
class DaToConfig(Config):
    """Options of DaTo. Raises `ConfigError` (`PolicyError` for the policy) naming the field and what is valid."""

    policy: Policy | str = "uniform-10"
    """A `Policy`, the name of a preset, or "uniform-N": FULL every N calls and depth 1 between."""
    patch: tuple[int, int] = (2, 2)
    """Rows and columns `(sy, sx)` of tokens that share one base token; each 1 to 8, product at least 2."""
    max_downsample: int = 1
    """Prune blocks whose token grid is the latent grid divided by at most this: 1, 2 or 4."""
    diff_gamma: float = 1.0
    """Weight of the dynamics score in the choice of base tokens (section 3.3)."""
    noise_alpha: float = 0.1
    """Weight of the random term in the choice of base tokens."""
    normalize_diff: bool = True
    """Divide the dynamics score by its mean over tokens, so that the two weights mean the same for every model."""
    diff_update: Literal["computed", "every"] = "computed"
    """Which calls enter the dynamics score: those that computed something, or every call (official code)."""
    sign_flip_prob: float = 0.0
    """Probability, per block call, of choosing the least dynamic tokens instead; the official code has 0.5."""
    selection: Literal["dynamics", "random", "similarity"] = "dynamics"
    """Base tokens by dynamics (DaTo), at random (as ToMeSD) or by the sum of similarities (as SiTo)."""
    recover: Literal["kept", "base"] = "kept"
    """A pruned token copies its closest kept token (official code) or its closest base token (paper)."""
    metric: Literal["hidden", "norm"] = "hidden"
    """Compare tokens by the block's input or by its first normalisation."""
    cfg_aligned: bool = True
    """Let the unconditional samples choose the base tokens for the conditional ones as well."""
    cfg_groups: int = 2
    """Parts of a guidance batch; read from the pipeline when there is one."""
    reuse_match: int = 1
    """Recompute a block's token plan at every n-th pruned call."""
    share_match: bool = False
    """One token plan per resolution and call, made by the first block."""
    kept_multiple: int = 1
    """Round the number of kept tokens up to this multiple; 64 keeps the graphs of the split backend few."""
    reuse_controlnet: bool = False
    """Reuse ControlNet residuals on every call that is not FULL (faster, not exact)."""
    backend: Literal["hooks", "split"] = "hooks"
    """Hooks around the model's own forward, or pure functions for `torch.compile` and CUDA graphs."""
    min_tokens: int = 256
    """Leave blocks with fewer tokens unpruned."""
    allow_grad: bool = False
    """Allow a model in training mode or with gradients; cached tensors are cut from the graph."""
    seed: int | None = 0
    """Seed of the generator of the random term; None draws a fresh one for every run."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of matching and recovery."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in self.patch:
            self.check(1 <= side <= 8, "patch", self.patch, "two numbers from 1 to 8")
        self.check(self.patch[0] * self.patch[1] >= 2, "patch", self.patch, "at least two tokens")
        self.check(self.max_downsample in (1, 2, 4), "max_downsample", self.max_downsample, "1, 2 or 4")
        for name in ("diff_gamma", "noise_alpha"):
            weight = getattr(self, name)
            self.check(math.isfinite(weight) and weight >= 0, name, weight, "a finite number of at least 0")
        self.check(0 <= self.sign_flip_prob <= 1, "sign_flip_prob", self.sign_flip_prob, "a probability, 0 to 1")
        for name in ("cfg_groups", "reuse_match", "kept_multiple", "min_tokens"):
            self.check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        limit = 1 - 1 / (self.patch[0] * self.patch[1])
        largest = max(self.policy_for(PRESET_CALLS).ratio if isinstance(self.policy, str) else self.policy.ratio)
        self.check(
            largest <= limit,
            "policy",
            largest,
            f"a pruning ratio of at most {limit:g}, as base tokens of patch {self.patch} are always kept",
        )

    def policy_for(self, num_calls: int, first_call: int = 0) -> Policy:
        """The policy of a run over `num_calls` denoiser calls, of which it makes those from `first_call` on."""
        policy = Policy.from_preset(self.policy, num_calls) if isinstance(self.policy, str) else self.policy
        return policy.for_run(num_calls, first_call)
