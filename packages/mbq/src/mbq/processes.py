"""Several processes that share the calibration samples: each has some of them, and all have the same sums."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mbq.errors import CalibrationError

Item = TypeVar("Item")


class Processes:
    """The processes of an `accelerate.Accelerator`, or this one alone."""

    def __init__(self, accelerator: Any = None) -> None:
        self.accelerator = accelerator
        self.index: int = 0 if accelerator is None else accelerator.process_index
        self.count: int = 1 if accelerator is None else accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.index == 0

    def share(self, items: Iterable[Item]) -> list[Item]:
        """The items of this process: every so many-th.

        Raises CalibrationError when there are fewer items than processes.
        """
        every = list(items)
        if len(every) < self.count:
            raise CalibrationError(
                f"{len(every)} calibration batches cannot be shared out among {self.count} processes"
            )
        return every[self.index :: self.count]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values`, on the CPU, over all processes."""
        return values if self.count == 1 else self._reduce(values, torch.distributed.ReduceOp.SUM)

    def maximum(self, values: Tensor) -> Tensor:
        """The largest of `values`, on the CPU, over all processes."""
        return values if self.count == 1 else self._reduce(values, torch.distributed.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        moved = values.to(self.accelerator.device, copy=True)
        torch.distributed.all_reduce(moved, operation)
        return moved.to(values.device)
