"""Which tokens a block prunes at a call: base tokens from the dynamics score, then the plan (sections 3.2 to 3.5)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dato.config import DaToConfig
from dato.functional import (
    TokenPlan,
    base_score,
    match_tokens,
    noise_difference,
    pool_score,
    prune_count,
    select_base_tokens,
    similarity_score,
)
from dato.state import Call, RunState, StoredPlan

TOKENWISE_PROCESSORS = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "FusedJointAttnProcessor2_0",
        "JointAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "XFormersJointAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    }
)
"""Processors of diffusers that treat hidden states as a set of tokens; others may reshape them to an image."""


@dataclass(frozen=True)
class PruneSite:
    """A transformer block whose self-attention can run on fewer tokens."""

    name: str
    """Path of the block in the model."""
    index: int
    """Number of the block, which seeds its noise."""
    norm: nn.Module
    """The normalisation before self-attention; its first argument is the block's input."""
    attentions: tuple[nn.Module, ...]
    """Modules that attend over the normalised tokens."""
    gather_first: bool
    """Whether tokens may be gathered before the normalisation, as nothing between the two looks at positions."""
    grid: Callable[[tuple[int, int]], tuple[int, int]]
    """Token grid of the block for a latent of a given height and width."""


class TokenPruner:
    """Builds the token plans of all sites of one denoiser."""

    def __init__(self, config: DaToConfig, run: RunState, cfg_groups: Callable[[], int]) -> None:
        self.config = config
        self.run = run
        self._cfg_groups = cfg_groups

    def plan(self, site: PruneSite, metric: Tensor) -> TokenPlan | None:
        """The plan for tokens `(B, N, C)` of `site` at the call in progress, or None when nothing is pruned."""
        call = self.run.call
        if call is None or call.ratio == 0:
            return None
        grid = site.grid(call.latent_size)
        num_prune = self.num_prune(call, site, grid)
        if num_prune == 0 or metric.shape[1] != grid[0] * grid[1] or not self.can_prune(site):
            return None
        plan = self._existing(call, site, grid, num_prune)
        matched = plan is None
        if plan is None:
            base_idx = self.base_tokens(call, site, grid, metric)
            plan = match_tokens(metric, base_idx, num_prune, recover=self.config.recover)
            if self.config.reuse_match > 1:
                call.memory.plans[site.name] = StoredPlan(plan)
        if self.config.share_match:
            call.shared[grid] = plan
        self.run.statistics.prune(call, site.name, plan.num_tokens, plan.num_kept, matched=matched)
        return plan

    def num_prune(self, call: Call, site: PruneSite, grid: tuple[int, int]) -> int:
        """Number R of tokens that `site` prunes at this call."""
        num_tokens = grid[0] * grid[1]
        if num_tokens < self.config.min_tokens:
            return 0
        multiple = self.config.kept_multiple
        return prune_count(num_tokens, call.ratio, num_base=self.num_base(grid), kept_multiple=multiple)

    def num_base(self, grid: tuple[int, int]) -> int:
        """Number M of base tokens on a token grid."""
        rows, columns = self.config.patch
        return (grid[0] // rows) * (grid[1] // columns)

    def can_prune(self, site: PruneSite) -> bool:
        """Whether the processors of `site` work on any set of tokens; warns once when not."""
        for attention in site.attentions:
            kind = type(getattr(attention, "processor", None))
            if kind.__name__ not in TOKENWISE_PROCESSORS or not kind.__module__.startswith("diffusers."):
                self.run.warn_once(
                    "processor",
                    f"{site.name} has the attention processor {kind.__name__}, which may need the whole token grid; "
                    "such blocks stay unpruned",
                )
                return False
        return True

    def base_tokens(self, call: Call, site: PruneSite, grid: tuple[int, int], metric: Tensor) -> Tensor:
        """Base tokens `(B, M)` of `site` at this call (section 3.3); `metric` matters to `selection="similarity"`."""
        config = self.config
        batch, num_tokens = metric.shape[:2]
        if config.selection == "random":
            score = self._generate(torch.rand, call, site, (1, num_tokens), metric.device).expand(batch, -1)
            return select_base_tokens(score, grid, config.patch)
        noise = None
        if config.noise_alpha > 0:
            noise = self._generate(torch.randn, call, site, (batch, num_tokens), metric.device)
        if config.selection == "similarity":
            difference, gamma, normalize = similarity_score(metric).float(), 1.0, False
        else:
            difference = self._dynamics(call, grid)
            gamma, normalize = config.diff_gamma, config.normalize_diff
            if config.sign_flip_prob > 0 and self._random(call, site).random() < config.sign_flip_prob:
                gamma = -gamma
        if difference is None and noise is None:
            score = metric.new_zeros(batch, num_tokens, dtype=torch.float32)
        else:
            score = base_score(difference, noise, gamma=gamma, alpha=config.noise_alpha, normalize=normalize)
        return select_base_tokens(
            score, grid, config.patch, cfg_aligned=config.cfg_aligned, cfg_groups=self._cfg_groups()
        )

    def _existing(self, call: Call, site: PruneSite, grid: tuple[int, int], num_prune: int) -> TokenPlan | None:
        shared = call.shared.get(grid)
        if shared is not None:
            return shared
        stored = call.memory.plans.get(site.name)
        if stored is None or stored.age >= self.config.reuse_match or stored.plan.prune_idx.shape[1] != num_prune:
            return None
        stored.age += 1
        return stored.plan

    def _dynamics(self, call: Call, grid: tuple[int, int]) -> Tensor | None:
        """Dynamics score `(B, h * w)` on the token grid; None before two predictions exist."""
        memory = call.memory
        if memory.latest is None or memory.before is None:
            return None
        if grid not in call.dynamics:
            # Inpainting adds input channels, learned variances add output channels: noise is what both have.
            channels = min(call.sample.shape[1], memory.latest.shape[1])
            before = memory.latest if memory.standing else memory.before
            score = noise_difference(memory.latest[:, :channels], before[:, :channels])
            call.dynamics[grid] = pool_score(score.nan_to_num(0.0, 0.0, 0.0), call.latent_size, grid)
        return call.dynamics[grid]

    def _generate(
        self,
        draw: Callable[..., Tensor],
        call: Call,
        site: PruneSite,
        shape: tuple[int, int],
        device: torch.device,
    ) -> Tensor:
        generator = torch.Generator(device=device).manual_seed(_mix(call.seed, call.index, site.index))
        return draw(shape, generator=generator, device=device)

    def _random(self, call: Call, site: PruneSite) -> random.Random:
        return random.Random(_mix(call.seed, call.index, site.index))


def gather_mask(attention_mask: Tensor, plan: TokenPlan, num_heads: int) -> Tensor:
    """The self-attention mask of the kept tokens.

    `attention_mask` is `(B, N)`, `(B, 1, N)`, `(B, N, N)` or with a dimension of heads, after B or multiplied to it;
    B may be 1. Raises `ValueError` naming any other shape.
    """
    batch, num_tokens = plan.gather_map.shape
    leading, last = attention_mask.shape[0], attention_mask.shape[-1]
    if leading not in (1, batch, batch * num_heads) or attention_mask.dim() < 2 or last != num_tokens:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit self-attention over "
            f"{batch} x {num_tokens} tokens: (batch, ..., tokens) is needed"
        )
    index = plan.keep_idx
    if leading == 1:
        attention_mask = attention_mask.expand(batch, *attention_mask.shape[1:])
    elif leading != batch:
        index = index.repeat_interleave(leading // batch, dim=0)
    attention_mask = _gather_along(attention_mask, index, -1)
    if attention_mask.dim() > 2 and attention_mask.shape[-2] == num_tokens:
        attention_mask = _gather_along(attention_mask, index, -2)
    return attention_mask


def _gather_along(values: Tensor, index: Tensor, dim: int) -> Tensor:
    view = [1] * values.dim()
    view[0], view[dim] = index.shape
    shape = list(values.shape)
    shape[dim] = index.shape[1]
    return values.gather(dim, index.view(view).expand(shape))


def _mix(seed: int, call: int, site: int) -> int:
    """One 62-bit seed from three numbers, such that neighbouring calls and sites are unrelated (splitmix64)."""
    mask = (1 << 64) - 1
    value = seed & mask
    for number in (call, site):
        value = (value + (number + 1) * 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value >> 2
