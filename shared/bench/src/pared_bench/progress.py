"""How long work tells that it is alive: plain lines, or bars in a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self, TextIO


class Progress(Protocol):
    """Where contexts report to."""

    def begin(self, description: str, total: int | None) -> int:
        """Open a task of `total` steps (None: unknown) and return its number."""

    def advance(self, task: int, steps: int = 1) -> None:
        """Count `steps` finished steps of a task."""

    def end(self, task: int) -> None:
        """Close a task."""

    def log(self, message: str) -> None:
        """Show one line."""


class PlainProgress:
    """One line when a task begins and one every `every` seconds while it lasts; `stream` None keeps silent."""

    def __init__(self, stream: TextIO | None = sys.stderr, every: float = 10.0) -> None:
        self._stream = stream
        self._every = every
        self._tasks: dict[int, _Task] = {}
        self._next = 0

    def begin(self, description: str, total: int | None) -> int:
        self._next += 1
        self._tasks[self._next] = _Task(description, total)
        self.log(f"{description} ..." if total is None else f"{description}: {total} steps")
        return self._next

    def advance(self, task: int, steps: int = 1) -> None:
        state = self._tasks[task]
        state.done += steps
        now = time.monotonic()
        if now - state.shown >= self._every:
            state.shown = now
            self.log(f"{state.description}: {state.done}" + ("" if state.total is None else f"/{state.total}"))

    def end(self, task: int) -> None:
        self._tasks.pop(task, None)

    def log(self, message: str) -> None:
        if self._stream is not None:
            print(message, file=self._stream, flush=True)


class _Task:
    def __init__(self, description: str, total: int | None) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self.shown = time.monotonic()


class RichProgress:
    """Bars on standard error, live while the `with` block lasts."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, description: str, total: int | None) -> int:
        return int(self._bars.add_task(_escape(description), total=total))

    def advance(self, task: int, steps: int = 1) -> None:
        from rich.progress import TaskID

        self._bars.advance(TaskID(task), steps)

    def end(self, task: int) -> None:
        from rich.progress import TaskID

        self._bars.remove_task(TaskID(task))

    def log(self, message: str) -> None:
        self._bars.console.print(_escape(message), highlight=False)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
