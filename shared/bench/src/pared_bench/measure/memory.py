"""Peak memory of a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class PeakMemory:
    """Bytes a call needed at its peak beyond what was allocated before it.

    `source` is "cuda" (the caching allocator's count, workspaces of operators included) or "tensors" (storages of the
    tensors that operators returned; memory an operator uses inside itself is not seen).
    """

    bytes: int
    source: str


def peak_memory(run: Callable[[], object], device: torch.device | str = "cpu") -> PeakMemory:
    """Measure the peak of one call of `run`; what it returns is alive at its end and counts."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return PeakMemory(torch.cuda.max_memory_allocated(device) - before, "cuda")
    with _StorageTracker(device) as tracker:
        run()
    return PeakMemory(tracker.peak, "tensors")


class _StorageTracker(TorchDispatchMode):
    """Adds up the storages on one device that operators create, and takes them off when they are freed."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if _has_storage(t)}
        result = func(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if _has_storage(item) and item.device.type == self._device.type:
                self._add(item.untyped_storage(), old)
        return result

    def _add(self, storage: Any, old: set[int]) -> None:
        key = id(storage)
        # a view, or an operator that writes into its input
        if key in self._alive or key in old:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self._alive.pop(key, None)
            self._bytes -= size

        self._alive[key] = weakref.ref(storage, freed)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)


def _has_storage(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.layout == torch.strided
