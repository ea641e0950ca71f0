"""What a demo or a bench is told when it runs: device, seed, size, output folder, progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pared_bench.progress import PlainProgress, Progress

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Context:
    """The surroundings of one run.

    Attributes: `device` (torch.device), `seed` (int), `full` (False: finish in a minute or two on a laptop; True: as
    long as it takes), `out` (an existing folder the run may write to).
    """

    device: torch.device
    seed: int
    full: bool
    out: Path

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        seed: int = 0,
        full: bool = False,
        out: Path | str = ".",
        progress: Progress | None = None,
    ) -> None:
        import torch

        self.device = torch.device(device)
        self.seed = seed
        self.full = full
        self.out = Path(out)
        self._progress = PlainProgress() if progress is None else progress

    def track(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items of `iterable` and show how many of `total` (its length when it has one) are done."""
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        task = self._progress.begin(description, total)
        try:
            for item in iterable:
                yield item
                self._progress.advance(task)
        finally:
            self._progress.end(task)

    def log(self, message: str) -> None:
        """Show one line to the user."""
        self._progress.log(message)


class DemoContext(Context):
    """What `<module>.demo.run` receives."""


class BenchContext(Context):
    """What `<module>.bench.run` receives."""
