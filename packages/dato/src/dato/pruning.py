"""Which tokens a block prunes at a call: base tokens from the dynamics score, then the plan (sections 3.2 to 3.5)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pared_kernels import dato_score_select
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
    unit: int
    """Unit the block belongs to; calls of a depth up to it leave the block out."""
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
        plan = call.shared.get(grid) or self.stored_plan(call, site, num_prune)
        matched = plan is None
        if plan is None:
            prepared = self.prepare(call, site, grid, metric.shape[0], metric.device)
            plan = self.match(prepared, metric, grid, num_prune)
            if self.config.reuse_match > 1:
                call.memory.plans[site.name] = StoredPlan(plan)
        if self.config.share_match:
            call.shared[grid] = plan
        self.run.statistics.prune(call, site.name, plan.num_tokens, plan.num_kept, matched=matched)
        return plan

    def match(self, prepared: Tensor | None, metric: Tensor, grid: tuple[int, int], num_prune: int) -> TokenPlan:
        """The plan for tokens `(B, N, C)`; a pure function of its arguments."""
        base_idx = self.base_tokens(prepared, metric, grid)
        return match_tokens(metric, base_idx, num_prune, recover=self.config.recover)

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

    def prepare(
        self, call: Call, site: PruneSite, grid: tuple[int, int], batch: int, device: torch.device
    ) -> Tensor | None:
        """What the choice of base tokens takes from outside the block (section 3.3).

        Base tokens `(B, M)`, or the noise `(B, N)` of `selection="similarity"` (None without noise).
        """
        config, num_tokens = self.config, grid[0] * grid[1]
        if config.selection == "random":
            score = self._generate(torch.rand, call, site, (1, num_tokens), device).expand(batch, -1)
            return select_base_tokens(score, grid, config.patch)
        if config.selection == "dynamics":
            return self._most_dynamic(call, site, grid, batch, device)
        if config.noise_alpha == 0:
            return None
        return self._generate(torch.randn, call, site, (batch, num_tokens), device)

    def base_tokens(self, prepared: Tensor | None, metric: Tensor, grid: tuple[int, int]) -> Tensor:
        """Base tokens `(B, M)` from what `prepare` gave and the tokens `(B, N, C)` that are compared."""
        if self.config.selection != "similarity":
            assert prepared is not None
            return prepared
        # SiTo: the token most similar to all others, with noise.
        score = similarity_score(metric).float()
        if prepared is not None:
            score = score + self.config.noise_alpha * prepared
        return self._select(score, grid)

    def _most_dynamic(
        self, call: Call, site: PruneSite, grid: tuple[int, int], batch: int, device: torch.device
    ) -> Tensor:
        config, (height, width) = self.config, call.latent_size
        gamma = config.diff_gamma
        if config.sign_flip_prob > 0 and random.Random(_mix(call.seed, call.index, site.index)).random() < (
            config.sign_flip_prob
        ):
            gamma = -gamma
        if height % grid[0] == 0 and width % grid[1] == 0:
            current, previous = self._predictions(call)
            groups = self._cfg_groups() if config.cfg_aligned else 1
            return dato_score_select(
                current,
                previous,
                grid=grid,
                patch=config.patch,
                gamma=gamma,
                alpha=config.noise_alpha,
                normalize=config.normalize_diff,
                seed=call.seed,
                call=call.index,
                block=site.index,
                cfg_groups=groups if batch % groups == 0 else 1,
            )
        noise = None
        if config.noise_alpha > 0:
            noise = self._generate(torch.randn, call, site, (batch, grid[0] * grid[1]), device)
        difference = self._dynamics(call, grid)
        if difference is None and noise is None:
            difference = torch.zeros(batch, grid[0] * grid[1], device=device)
        return self._select(
            base_score(difference, noise, gamma=gamma, alpha=config.noise_alpha, normalize=config.normalize_diff), grid
        )

    def _select(self, score: Tensor, grid: tuple[int, int]) -> Tensor:
        config = self.config
        return select_base_tokens(
            score, grid, config.patch, cfg_aligned=config.cfg_aligned, cfg_groups=self._cfg_groups()
        )

    def _predictions(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """The two predictions `(B, C, H, W)` that give the dynamics; before there are two, any tensor and None."""
        memory = call.memory
        if memory.latest is None or memory.before is None:
            return call.sample, None
        # Inpainting adds input channels, learned variances add output channels: noise is what both have.
        channels = min(call.sample.shape[1], memory.latest.shape[1])
        latest = memory.latest[:, :channels]
        return latest, latest if memory.standing else memory.before[:, :channels]

    def stored_plan(self, call: Call, site: PruneSite, num_prune: int) -> TokenPlan | None:
        """The plan of an earlier call that `reuse_match` lets this one use, counted as one more use."""
        stored = call.memory.plans.get(site.name)
        if stored is None or stored.age >= self.config.reuse_match or stored.plan.prune_idx.shape[1] != num_prune:
            return None
        stored.age += 1
        return stored.plan

    def _dynamics(self, call: Call, grid: tuple[int, int]) -> Tensor | None:
        """Dynamics score `(B, h * w)` on a token grid that does not divide the latent's."""
        current, previous = self._predictions(call)
        if previous is None:
            return None
        if grid not in call.dynamics:
            score = noise_difference(current, previous).nan_to_num(0.0, 0.0, 0.0)
            call.dynamics[grid] = pool_score(score, call.latent_size, grid)
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
