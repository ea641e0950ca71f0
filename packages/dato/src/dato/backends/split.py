"""The split backend: a UNet call of each depth as one pure function, for compilation and CUDA graphs (section 7.2)."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pared_hooks import Patch, UnsupportedModelError
from torch import Tensor

from dato.adapters.unet import UNetAdapter
from dato.adapters.unet_forward import Conditioning, Pruned, unet_forward
from dato.backends.hooks import wrap_denoiser
from dato.functional import FULL, TokenPlan
from dato.pruning import PruneSite, TokenPruner
from dato.state import Call, RunState, StoredPlan


@dataclass(frozen=True)
class Variant:
    """What tells one function, and so one compiled graph, from another."""

    depth: int
    kept: tuple[tuple[int, int], ...]
    """Index in the adapter's sites and number of kept tokens, for each pruned block."""
    planned: frozenset[int]
    """Sites whose token plan is handed in; the others make their own."""


class SplitBackend:
    """The functions of one UNet, made when a variant first occurs."""

    def __init__(self, adapter: UNetAdapter, run: RunState, pruner: TokenPruner, *, prunes: bool) -> None:
        self._adapter = adapter
        self._run = run
        self._pruner = pruner
        self._sites = adapter.sites if prunes else ()
        self._functions: dict[Variant, Callable[..., Any]] = {}
        self._compile_options: dict[str, Any] | None = None

    def install(self, patch: Patch) -> None:
        """Let the denoiser's forward call the functions."""
        wrap_denoiser(patch, self._adapter, self._run, self._compute)

    def compile(self, options: dict[str, Any]) -> None:
        """Compile the functions from now on, each on its own."""
        self._compile_options = {"fullgraph": True, **options}
        self._functions.clear()

    def _compute(self, original: Any, call: Call, arguments: dict[str, Any]) -> Any:
        conditioning = Conditioning.of(self._adapter, arguments)
        sample = arguments["sample"]
        timestep = torch.as_tensor(arguments["timestep"], device=sample.device)
        variant, prepared = self._prepare(call)
        deep = None if call.depth == FULL else call.stored()
        if self._compile_options is not None:
            torch.compiler.cudagraph_mark_step_begin()
        prediction, features, plans = self._function(variant)(sample, timestep, conditioning, deep, prepared)
        # A CUDA graph writes its outputs to the same memory at every replay.
        call.protect = self._compile_options is not None
        if call.protect:
            prediction = prediction.clone()
        for depth, feature in features.items():
            call.store(depth, feature)
        self._keep_plans(call, plans)
        return self._adapter.wrap_output(prediction, arguments)

    def _prepare(self, call: Call) -> tuple[Variant, dict[int, Any]]:
        """The variant for this call and, by site, its token plan or what the choice of base tokens takes."""
        kept: list[tuple[int, int]] = []
        planned: set[int] = set()
        prepared: dict[int, Any] = {}
        batch, device = call.sample.shape[0], call.sample.device
        leaders: set[tuple[int, int]] = set()
        for index, site in enumerate(self._sites):
            if not call.computes(site.unit):
                continue
            grid = site.grid(call.latent_size)
            num_prune = self._pruner.num_prune(call, site, grid)
            if num_prune == 0 or not self._pruner.can_prune(site):
                continue
            kept.append((index, grid[0] * grid[1] - num_prune))
            follows = self._pruner.config.share_match and grid in leaders
            leaders.add(grid)
            plan = None if follows else self._pruner.stored_plan(call, site, num_prune)
            if plan is not None:
                planned.add(index)
                prepared[index] = (plan.keep_idx, plan.prune_idx, plan.source_pos, plan.gather_map)
            elif not follows:
                prepared[index] = self._pruner.prepare(call, site, grid, batch, device)
            matched = plan is None and not follows
            num_tokens = grid[0] * grid[1]
            self._run.statistics.prune(call, site.name, num_tokens, num_tokens - num_prune, matched=matched)
        return Variant(call.depth, tuple(kept), frozenset(planned)), prepared

    def _keep_plans(self, call: Call, plans: dict[int, tuple[Tensor, ...]]) -> None:
        if self._pruner.config.reuse_match == 1:
            return
        for index, tensors in plans.items():
            tensors = tuple(tensor.clone() for tensor in tensors) if call.protect else tensors
            call.memory.plans[self._sites[index].name] = StoredPlan(TokenPlan(*tensors))

    def _function(self, variant: Variant) -> Callable[..., Any]:
        function = self._functions.get(variant)
        if function is None:
            function = self._make(variant)
            if self._compile_options is not None:
                function = torch.compile(_with_own_code(function, len(self._functions)), **self._compile_options)
            self._functions[variant] = function
        return function

    def _make(self, variant: Variant) -> Callable[..., Any]:
        adapter, pruner, depths = self._adapter, self._pruner, self._run.depths
        sites = {index: self._sites[index] for index, _ in variant.kept}
        kept = dict(variant.kept)
        returns_plans = pruner.config.reuse_match > 1

        def call(
            sample: Tensor, timestep: Tensor, conditioning: Conditioning, deep: Tensor | None, prepared: dict[int, Any]
        ) -> tuple[Tensor, dict[int, Tensor], dict[int, tuple[Tensor, ...]]]:
            plans = _Plans(pruner, sites, kept, variant.planned, prepared, (sample.shape[-2], sample.shape[-1]))
            pruned = {site.name: plans.pruned(index) for index, site in sites.items()}
            prediction, features = unet_forward(
                adapter, sample, timestep, conditioning, variant.depth, deep, depths, pruned
            )
            return prediction, features, plans.made if returns_plans else {}

        return call


class _Plans:
    """The token plans inside one function: handed in, shared by a block before, or made."""

    def __init__(
        self,
        pruner: TokenPruner,
        sites: dict[int, PruneSite],
        kept: dict[int, int],
        planned: Iterable[int],
        prepared: dict[int, Any],
        latent_size: tuple[int, int],
    ) -> None:
        self._pruner = pruner
        self._sites = sites
        self._kept = kept
        self._planned = planned
        self._prepared = prepared
        self._latent_size = latent_size
        self._shared: dict[tuple[int, int], TokenPlan] = {}
        self.made: dict[int, tuple[Tensor, ...]] = {}

    def pruned(self, index: int) -> Pruned:
        return Pruned(lambda metric: self._plan(index, metric), self._pruner.config.metric)

    def _plan(self, index: int, metric: Tensor) -> TokenPlan:
        grid = self._sites[index].grid(self._latent_size)
        if grid in self._shared:
            return self._shared[grid]
        if index in self._planned:
            plan = TokenPlan(*self._prepared[index])
        else:
            num_prune = grid[0] * grid[1] - self._kept[index]
            plan = self._pruner.match(self._prepared[index], metric, grid, num_prune)
            self.made[index] = (plan.keep_idx, plan.prune_idx, plan.source_pos, plan.gather_map)
        if self._pruner.config.share_match:
            self._shared[grid] = plan
        return plan


def require_unet(adapter: Any) -> UNetAdapter:
    """The adapter, if the split backend knows its family; raises `UnsupportedModelError` otherwise."""
    if not isinstance(adapter, UNetAdapter):
        raise UnsupportedModelError(
            f'DaToConfig(backend="split") supports UNet2DConditionModel; use backend="hooks" for '
            f"{type(adapter.denoiser).__name__}"
        )
    return adapter


def _with_own_code(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`function` with a code object of its own: torch.compile counts graphs per code object, as recompilations."""
    assert isinstance(function, types.FunctionType)
    name = f"{function.__name__}_{number}"
    return types.FunctionType(
        function.__code__.replace(co_name=name), function.__globals__, name, function.__defaults__, function.__closure__
    )
