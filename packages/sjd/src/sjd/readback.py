"""Counts from the device to the host, without waiting for the pass that makes them where that is possible."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """`push` hands over the counts of a pass and returns those the host may read now.

    At once, or with `late` those of the pass before: the host then prepares a pass while the one before still runs.
    """

    def __init__(self, late: bool) -> None:
        self.late = late
        self._waiting: tuple[Tensor, torch.cuda.Event] | None = None

    def push(self, counts: Tensor) -> list[int] | None:
        """Take counts (B,) int64 and return the ones that are there, or None at first."""
        if not self.late:
            return counts.tolist()
        earlier = self.rest()
        on_host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
        on_host.copy_(counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting = (on_host, event)
        return earlier

    def rest(self) -> list[int] | None:
        """The counts that were not returned yet; waits for them."""
        if self._waiting is None:
            return None
        counts, event = self._waiting
        self._waiting = None
        event.synchronize()
        return counts.tolist()
