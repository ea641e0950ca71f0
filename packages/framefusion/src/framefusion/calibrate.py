"""`calibrate`: the similarity threshold for a model, by how little its answers change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pared_hooks import ConfigError
from torch import Tensor, nn

from framefusion.apply import applied
from framefusion.config import FrameFusionConfig
from framefusion.layout import LayoutResolver, TokenLayout

GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    cost: float | FrameFusionConfig = 0.3,
    grid: Sequence[float] = GRID,
    *,
    layout: TokenLayout | LayoutResolver | None = None,
) -> FrameFusionConfig:
    """The configuration of this `cost` whose threshold, of those in `grid`, keeps the next token closest to the dense
    model's: least Kullback-Leibler divergence at the last position, averaged over the prompts of `batches`.

    `batches` are arguments of the model, padded on the left; a `FrameFusionConfig` in place of the cost gives the other
    options. Raises `ConfigError` for an empty grid or no batches, else what `apply` raises.
    """
    base = cost if isinstance(cost, FrameFusionConfig) else FrameFusionConfig(cost=cost)
    prompts = list(batches)
    if not grid or not prompts:
        name = "batches" if grid else "grid"
        raise ConfigError(f"{name} is empty; valid: at least one", name)
    dense = [_last(model, one) for one in prompts]
    losses = []
    for threshold in grid:
        with applied(model, base.replace(similarity_threshold=threshold), layout=layout):
            parts = [_divergence(p, _last(model, one)) for p, one in zip(dense, prompts, strict=True)]
        losses.append(torch.cat(parts).mean().item())
    return base.replace(similarity_threshold=grid[losses.index(min(losses))])


def _last(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, use_cache=False).logits[:, -1].float().log_softmax(-1)


def _divergence(dense: Tensor, reduced: Tensor) -> Tensor:
    return (dense.exp() * (dense - reduced)).sum(-1)
