"""`fit`: factors in closed form; `allocate_ranks`: one budget shared out among layers, keys and values."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from pared_hooks import ConfigError
from torch import Tensor, nn

from cskv.adapters import adapters_of
from cskv.calibrate import Statistics
from cskv.config import CSKVConfig
from cskv.factors import Factors, LayerFactors, fingerprint
from cskv.functional import asvd_factors, moment_roots, rank_from_density, svd_factors, whitened_factors
from cskv.plan import FULL, LayerPlan, plan_layers


class RankPlan(NamedTuple):
    """Ranks of keys and of values, one for each full-attention layer: `CSKVConfig(k_rank=..., v_rank=...)`."""

    k_rank: tuple[int, ...]
    v_rank: tuple[int, ...]


def fit(
    model: nn.Module,
    config: CSKVConfig,
    stats: Statistics | None = None,
    *,
    track: Callable[[Iterable[Any]], Iterable[Any]] = lambda layers: layers,
) -> Factors:
    """Factors of the key and value projections of every compressed layer, as `config.init` says (section 3.2).

    `stats` come from `calibrate`; `init="svd"` needs none. Sides of full rank get no factor. Raises ConfigError (a
    ValueError) without the statistics that `init` needs, naming `calibrate`, for statistics that are not finite, lack a
    layer or saw fewer tokens than the rank, and for what `plan_layers` refuses.
    """
    _, plans = plan_layers(model, config)
    needed = any(plan.rank(side) is not None for plan in plans for side in ("k", "v"))
    if needed and config.init != "svd":
        _check_statistics(config, plans, stats)
    layers, sketches = {}, {}
    for plan in track(plans):
        maps = plan.adapter.maps()
        sides = [
            _side(config, plan, weight, plan.rank(side), stats) for side, (weight, _) in zip("kv", maps, strict=True)
        ]
        layers[plan.index] = LayerFactors(*sides[0], *sides[1])
        sketches[plan.index] = fingerprint(maps[0][0])
    return Factors(layers, sketches)


def _side(
    config: CSKVConfig, plan: LayerPlan, weight: Tensor, rank: int | None, stats: Statistics | None
) -> tuple[Tensor | None, Tensor | None]:
    if rank is None:
        return None, None
    if config.init == "svd":
        return svd_factors(weight, rank)
    assert stats is not None
    if config.init == "asvd":
        return asvd_factors(weight, rank, stats.abs_means[plan.index].to(weight.device), alpha=config.asvd_alpha)
    return whitened_factors(weight, rank, stats.second_moment(plan.index).to(weight.device))


def _check_statistics(config: CSKVConfig, plans: list[LayerPlan], stats: Statistics | None) -> None:
    if not isinstance(stats, Statistics):
        raise ConfigError(
            f"init = {config.init!r} needs statistics, got {type(stats).__name__}: "
            'stats = cskv.calibrate(model, batches); without them, init="svd" works',
            "init",
        )
    stats.check()
    for plan in plans:
        if plan.index not in stats.second_moments:
            known = ", ".join(map(str, sorted(stats.second_moments)))
            raise ConfigError(f"stats have no layer {plan.index}, only {known}; calibrate this model", "stats")
        channels = stats.second_moments[plan.index].shape[0]
        if channels != plan.adapter.hidden_size:
            raise ConfigError(
                f"stats of layer {plan.index} have {channels} channels; this model has {plan.adapter.hidden_size}",
                "stats",
            )
        rank = max(plan.k_rank or 0, plan.v_rank or 0)
        if stats.tokens < rank:
            raise ConfigError(
                f"stats saw {stats.tokens} tokens, fewer than rank {rank} of layer {plan.index}; calibrate on more",
                "stats",
            )


def allocate_ranks(model: nn.Module, stats: Statistics, density: float) -> RankPlan:
    """Share one budget of ranks out among layers, keys and values by their whitened singular values.

    The budget is that of `density` for every side. Starting from one channel a head, the side whose next channels lower
    the sum of relative errors most gets them; as singular values fall, this is the minimum of
    sum_sides (sum_{i > r} s_i^2 / sum_i s_i^2). Ranks are multiples of the key-value heads. Raises ConfigError for
    statistics that do not fit the model, ValueError for a density outside (0, 1].
    """
    _, adapters = adapters_of(model)
    full = [adapter for adapter in adapters if adapter.layer_type == FULL]
    _, plans = plan_layers(model, CSKVConfig(k_density=density, v_density=density))
    _check_statistics(CSKVConfig(), plans, stats)
    step = full[0].num_kv_heads
    gains: list[list[float]] = []
    for adapter in full:
        root, _ = moment_roots(stats.second_moment(adapter.index))
        for weight, _ in adapter.maps():
            energy = torch.linalg.svdvals(weight.double().to(root.device) @ root).square()
            energy = torch.nn.functional.pad(energy, (0, -len(energy) % step)).view(-1, step).sum(1)
            gains.append((energy / energy.sum()).tolist())
    budget = sum(2 * rank_from_density(density, one.num_kv_heads, one.head_dim) for one in full) // step
    taken = [1] * len(gains)
    queue = [(-gain[1], side) for side, gain in enumerate(gains) if len(gain) > 1]
    heapq.heapify(queue)
    for _ in range(budget - len(gains)):
        if not queue:
            break
        _, side = heapq.heappop(queue)
        taken[side] += 1
        if taken[side] < len(gains[side]):
            heapq.heappush(queue, (-gains[side][taken[side]], side))
    ranks = [min(step * count, full[0].width) for count in taken]
    return RankPlan(tuple(ranks[0::2]), tuple(ranks[1::2]))
