"""The control of token pruning: what it costs in quality when the pruned tokens are drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dato import pruning
from dato.functional import Recover, TokenPlan, plan_for_pruned


@contextmanager
def random_pruning(seed: int) -> Iterator[None]:
    """Prune random tokens that are not base, as many as dato would; each still copies its closest kept token."""
    generator = torch.Generator().manual_seed(seed)

    def match_tokens(metric: Tensor, base_idx: Tensor, num_prune: int, *, recover: Recover = "kept") -> TokenPlan:
        batch, num_tokens = metric.shape[:2]
        order = torch.rand(batch, num_tokens, generator=generator).to(metric.device)
        order = order.scatter(1, base_idx, 2.0)  # base tokens come last
        return plan_for_pruned(metric, order.argsort(dim=1)[:, :num_prune])

    original = pruning.match_tokens
    pruning.match_tokens = match_tokens
    try:
        yield
    finally:
        pruning.match_tokens = original
