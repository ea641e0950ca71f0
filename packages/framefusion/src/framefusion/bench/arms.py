"""Ways to meet a cost, by name: FrameFusion, its two halves, and the methods it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from framefusion.apply import FrameFusionHandle, apply
from framefusion.baselines import (
    apply_evs,
    apply_fastv,
    apply_frame_subsample,
    apply_random,
    apply_window,
    fastv_share,
)
from framefusion.config import FrameFusionConfig
from framefusion.layout import LayoutResolver

Arm = Callable[[Any], FrameFusionHandle]
"""Takes the model and returns the handle of the method on it."""

OURS, FASTV, WINDOW = "framefusion", "fastv", "window"
FASTV_LAYER = 2


def arms(config: FrameFusionConfig, depth: int, layout: LayoutResolver | None = None, seed: int = 0) -> dict[str, Arm]:
    """The arms at `config.cost` over `depth` layers, with videos where `layout` says; `seed` is the random one's."""
    cost = config.cost
    layer = FASTV_LAYER if fastv_share(cost, FASTV_LAYER, depth) > 0 else 1
    share = fastv_share(cost, layer, depth)
    found: dict[str, Arm] = {
        OURS: lambda model: apply(model, config, layout=layout),
        # Every token is alike enough: the budget decides, at once.
        "similarity alone": lambda model: apply(model, config.replace(similarity_threshold=-1.0), layout=layout),
        # No token is: all is left to pruning.
        "importance alone": lambda model: apply(model, config.replace(similarity_threshold=1.0), layout=layout),
        "evs": lambda model: apply_evs(model, 1 - cost, layout=layout),
        "random": lambda model: apply_random(model, 1 - cost, torch.Generator().manual_seed(seed), layout=layout),
        "uniform frames": lambda model: apply_frame_subsample(model, cost, layout=layout),
        WINDOW: lambda model: apply_window(model, cost, layout=layout),
    }
    if share > 0:
        found[FASTV] = lambda model: apply_fastv(model, layer, share, layout=layout)
    return found
