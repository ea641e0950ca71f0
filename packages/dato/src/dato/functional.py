"""DaTo as pure tensor functions: dynamics score, base tokens, token matching, policy resampling, Pareto ranking.

Symbols: ``B`` samples, ``N = h * w`` tokens, ``C`` channels, ``M`` base tokens, ``R`` pruned tokens. Index tensors are
int64 on the device of the input they index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pared_kernels import best_match
from torch import Tensor

FULL = -1
"""Depth of a call that computes every unit of the model."""

Recover = Literal["kept", "base"]


@dataclass(frozen=True)
class TokenPlan:
    """Which tokens of a ``(B, N, ...)`` tensor stay, and where each pruned token takes its value from (section 3.4)."""

    keep_idx: Tensor
    """``(B, N - R)`` kept tokens, ascending."""
    prune_idx: Tensor
    """``(B, R)`` pruned tokens, ascending."""
    source_pos: Tensor
    """``(B, R)`` position in ``keep_idx`` of the token each pruned token copies."""
    gather_map: Tensor
    """``(B, N)`` position in ``keep_idx`` whose value each token receives."""

    @property
    def num_kept(self) -> int:
        """Number of kept tokens per sample."""
        return self.keep_idx.shape[1]

    @property
    def num_tokens(self) -> int:
        """Number of tokens per sample before pruning."""
        return self.gather_map.shape[1]


def noise_difference(current: Tensor, previous: Tensor) -> Tensor:
    """Dynamics score D: mean over channels of ``|current - previous|`` (section 3.2).

    Both ``(B, C, H, W)``; returns ``(B, H * W)`` row-major in fp32.
    Raises ``ValueError`` when the shapes differ or are not four-dimensional.
    """
    if current.shape != previous.shape or current.dim() != 4:
        raise ValueError(
            "noise_difference needs two tensors of one shape (B, C, H, W), "
            f"got {tuple(current.shape)} and {tuple(previous.shape)}"
        )
    dtype = _accumulation_dtype(current)
    return (current.to(dtype) - previous.to(dtype)).abs().mean(dim=1).flatten(1).float()


def pool_score(score: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Average-pool a ``(B, H * W)`` score of ``size = (H, W)`` to ``(B, h * w)`` of ``grid = (h, w)`` (section 3.2)."""
    _check_grid("score", score, "size", size)
    if tuple(size) == tuple(grid):
        return score
    return torch.nn.functional.adaptive_avg_pool2d(score.unflatten(1, size).unsqueeze(1), grid).flatten(1)


def base_score(
    difference: Tensor | None, noise: Tensor | None, *, gamma: float = 1.0, alpha: float = 0.1, normalize: bool = True
) -> Tensor:
    """``gamma * D + alpha * z``, the score that base tokens maximise (section 3.3).

    ``difference`` and ``noise`` are ``(B, N)``; either may be None, which leaves its term out (not both).
    ``normalize`` divides D by its mean over the tokens of each sample; NaN and inf in D count as 0.
    """
    if difference is None:
        if noise is None:
            raise ValueError("base_score needs difference or noise; both are None")
        return alpha * noise
    score = difference.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if normalize:
        mean = score.mean(dim=1, keepdim=True)
        score = score / mean.clamp_min(torch.finfo(score.dtype).tiny)
    score = gamma * score
    return score if noise is None else score + alpha * noise


def similarity_score(metric: Tensor) -> Tensor:
    """SiTo's score: the sum of the cosines of each token of ``(B, N, C)`` to all tokens, ``(B, N)`` in fp32 or fp64."""
    values = metric.to(_accumulation_dtype(metric))
    norm = values.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 0, values / norm.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    return (unit * unit.sum(dim=1, keepdim=True)).sum(dim=-1)


def select_base_tokens(
    score: Tensor, grid: tuple[int, int], patch: tuple[int, int], *, cfg_aligned: bool = False, cfg_groups: int = 2
) -> Tensor:
    """Base tokens: the argmax of the score in each patch of the token grid (section 3.3).

    ``score`` is ``(B, h * w)``, ``grid = (h, w)``, ``patch = (sy, sx)``. Returns ``(B, M)`` flat indices with
    ``M = (h // sy) * (w // sx)``, patches in row-major order, ties to the first token of the patch. Rows and columns
    that do not fill a patch hold no base token. ``cfg_aligned``: sample ``b`` uses the scores of sample
    ``b % (B / cfg_groups)``, unless ``cfg_groups`` does not divide ``B``.
    """
    _check_grid("score", score, "grid", grid)
    (h, w), (sy, sx) = grid, patch
    if not (1 <= sy <= h and 1 <= sx <= w):
        raise ValueError(f"patch={tuple(patch)} does not fit the token grid {tuple(grid)}")
    batch, device = score.shape[0], score.device
    if cfg_aligned and batch % cfg_groups == 0:
        score = score[: batch // cfg_groups].repeat(cfg_groups, 1)
    rows, columns = h // sy, w // sx
    patches = score.unflatten(1, grid)[:, : rows * sy, : columns * sx]
    patches = patches.unflatten(2, (columns, sx)).unflatten(1, (rows, sy)).transpose(2, 3).flatten(3)
    offset = _first_argmax(patches)
    y = torch.arange(rows, device=device)[:, None] * sy + offset // sx
    x = torch.arange(columns, device=device)[None, :] * sx + offset % sx
    return (y * w + x).flatten(1)


def prune_count(num_tokens: int, ratio: float, *, num_base: int = 0, kept_multiple: int = 1) -> int:
    """Number R of tokens to prune of ``num_tokens``: ``int(N * r)`` (section 3.4).

    Never more than the tokens that are not base; the kept count is rounded up to a multiple of ``kept_multiple``.
    """
    pruned = min(int(num_tokens * ratio), num_tokens - num_base)
    kept = -(-(num_tokens - pruned) // kept_multiple) * kept_multiple
    return max(num_tokens - kept, 0)


def match_tokens(metric: Tensor, base_idx: Tensor, num_prune: int, *, recover: Recover = "kept") -> TokenPlan:
    """Choose the tokens to prune and the token each of them copies, by cosine similarity (sections 3.4 and 3.5).

    ``metric`` is ``(B, N, C)``, ``base_idx`` ``(B, M)`` without repetitions. The ``num_prune`` tokens most similar to
    their closest base token are pruned, ties to the lower index. Their source is the closest kept token
    (``recover="kept"``) or the closest base token (``"base"``), ties to the lower index. Zero tokens have
    similarity 0. Similarities accumulate in fp32 (fp64 for fp64 inputs). Never holds an ``N x N`` tensor.
    Raises ``ValueError`` for a wrong shape, an unknown ``recover``, or ``num_prune`` outside ``0..N - M``.
    """
    if metric.dim() != 3 or base_idx.dim() != 2 or base_idx.shape[0] != metric.shape[0]:
        raise ValueError(
            "match_tokens needs metric (B, N, C) and base_idx (B, M), "
            f"got {tuple(metric.shape)} and {tuple(base_idx.shape)}"
        )
    if recover not in ("kept", "base"):
        raise ValueError(f"recover={recover!r} is not one of 'kept', 'base'")
    batch, num_tokens = metric.shape[:2]
    num_base = base_idx.shape[1]
    if not 0 <= num_prune <= num_tokens - num_base:
        raise ValueError(f"num_prune={num_prune} is outside 0..{num_tokens - num_base} (tokens that are not base)")
    if num_prune == 0:
        everything = torch.arange(num_tokens, device=metric.device).repeat(batch, 1)
        nothing = everything[:, :0]
        return TokenPlan(everything, nothing, nothing, everything)

    is_base = _membership(base_idx, num_tokens)
    candidates, base = _split(is_base, num_tokens - num_base)
    similarity, closest_base = best_match(metric, candidates, base)
    ranked = similarity.sort(dim=1, descending=True, stable=True).indices[:, :num_prune]
    if recover == "kept":
        return plan_for_pruned(metric, candidates.gather(1, ranked))
    source = base.gather(1, closest_base.gather(1, ranked.sort(dim=1).values))
    return _plan(candidates.gather(1, ranked), num_tokens, lambda _keep, _prune, position: position.gather(1, source))


def plan_for_pruned(metric: Tensor, pruned: Tensor) -> TokenPlan:
    """The plan that prunes given tokens, each of which copies its closest kept token (section 3.5).

    ``metric`` is ``(B, N, C)``, ``pruned`` ``(B, R)`` with ``R < N`` and without repetitions, in any order.
    """
    return _plan(pruned, metric.shape[1], lambda keep, prune, _position: best_match(metric, prune, keep)[1])


def _plan(pruned: Tensor, num_tokens: int, sources: Callable[[Tensor, Tensor, Tensor], Tensor]) -> TokenPlan:
    """The plan that prunes ``(B, R)`` tokens.

    ``sources(keep_idx, prune_idx, position)`` gives ``source_pos``; ``position`` ``(B, N)`` is that of each kept token.
    """
    is_pruned = _membership(pruned, num_tokens)
    keep_idx, prune_idx = _split(is_pruned, num_tokens - pruned.shape[1])
    position = is_pruned.logical_not().cumsum(dim=1) - 1
    source_pos = sources(keep_idx, prune_idx, position)
    return TokenPlan(keep_idx, prune_idx, source_pos, position.scatter(1, prune_idx, source_pos))


def prune_tokens(x: Tensor, plan: TokenPlan) -> Tensor:
    """The kept tokens of ``x``: ``(B, N, C)`` to ``(B, N - R, C)`` (section 3.5)."""
    return _gather_tokens(x, plan.keep_idx)


def recover_tokens(y: Tensor, plan: TokenPlan) -> Tensor:
    """Spread the outputs of kept tokens over all tokens: ``(B, N - R, C)`` to ``(B, N, C)`` (section 3.5)."""
    return _gather_tokens(y, plan.gather_map)


def resample_policy(depth: Sequence[int], ratio: Sequence[float], m: int) -> tuple[list[int], list[float]]:
    """Stretch a schedule of ``n`` calls to ``m`` calls by nearest index, halves away from zero (section 3.7).

    Entry 0 becomes ``FULL``. Raises ``ValueError`` when the lengths differ, are 0, or ``m < 1``.
    """
    n = len(depth)
    if n != len(ratio) or n == 0:
        raise ValueError(f"depth and ratio need one length of at least 1, got {n} and {len(ratio)}")
    if m < 1:
        raise ValueError(f"m={m} calls: at least 1 is needed")
    last = max(m - 1, 1)
    index = [(2 * j * (n - 1) + last) // (2 * last) for j in range(m)]
    return [FULL, *(depth[i] for i in index[1:])], [ratio[i] for i in index]


def nondominated_sort(F: Sequence[Sequence[float]]) -> list[int]:
    """Pareto rank of each row of objectives, 0 = best, all objectives minimised; equal rows share a rank."""
    rows = [tuple(float(value) for value in row) for row in F]
    dominates = [[_dominates(a, b) for b in rows] for a in rows]
    rank = [0] * len(rows)
    remaining = set(range(len(rows)))
    level = 0
    while remaining:
        front = {i for i in remaining if not any(dominates[j][i] for j in remaining)}
        for i in front:
            rank[i] = level
        remaining -= front
        level += 1
    return rank


def crowding_distance(F: Sequence[Sequence[float]]) -> list[float]:
    """NSGA-II crowding distance of the rows of one front: inf at the boundaries of every objective."""
    rows = [tuple(float(value) for value in row) for row in F]
    distance = [0.0] * len(rows)
    for objective in range(len(rows[0]) if rows else 0):
        order = sorted(range(len(rows)), key=lambda i: rows[i][objective])
        values = [rows[i][objective] for i in order]
        distance[order[0]] = distance[order[-1]] = float("inf")
        span = values[-1] - values[0]
        if span > 0:
            for position in range(1, len(order) - 1):
                distance[order[position]] += (values[position + 1] - values[position - 1]) / span
    return distance


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_grid(name: str, score: Tensor, grid_name: str, grid: tuple[int, int]) -> None:
    if score.dim() != 2 or score.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{name} needs shape (B, {grid[0]} * {grid[1]}) for {grid_name}={tuple(grid)}, got {tuple(score.shape)}"
        )


def _first_argmax(values: Tensor) -> Tensor:
    """Argmax over the last dimension, ties to the first entry (``Tensor.argmax`` promises no order), NaN as largest."""
    is_best = (values == values.amax(dim=-1, keepdim=True)) | values.isnan()
    offset = torch.arange(values.shape[-1], device=values.device)
    return torch.where(is_best, offset, values.shape[-1]).amin(dim=-1)


def _membership(index: Tensor, num_tokens: int) -> Tensor:
    mask = torch.zeros(index.shape[0], num_tokens, dtype=torch.bool, device=index.device)
    return mask.scatter(1, index, True)


def _split(mask: Tensor, num_false: int) -> tuple[Tensor, Tensor]:
    """Ascending indices of the False and of the True entries; every row of ``mask`` has ``num_false`` False entries."""
    order = mask.to(torch.int8).sort(dim=1, stable=True).indices
    return order[:, :num_false], order[:, num_false:]


def _gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
