"""`Handle`: what a method hands back when it has been applied to a model."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pared_hooks.patch import Patch

HandleType = TypeVar("HandleType", bound="Handle")


class Handle:
    """A method applied to a model: ask it what it did, forget its per-run state, take it off again.

    As a context manager it removes itself on leaving. Packages subclass it and override `stats` and `reset`, or pass
    the two as callables.
    """

    def __init__(
        self,
        patch: Patch,
        stats: Callable[[], dict[str, Any]] | None = None,
        reset: Callable[[], None] | None = None,
    ) -> None:
        self.patch = patch
        self._stats = stats
        self._reset = reset

    @property
    def applied(self) -> bool:
        """Whether the method is still on the model."""
        return not self.patch.removed

    def stats(self) -> dict[str, Any]:
        """Return what the method did since the last reset."""
        return self._stats() if self._stats is not None else {}

    def reset(self) -> None:
        """Forget per-run state and statistics; the method stays applied."""
        if self._reset is not None:
            self._reset()

    def remove(self) -> None:
        """Take the method off the model, which is then as before; a second call does nothing."""
        self.patch.remove()

    def __enter__(self: HandleType) -> HandleType:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.patch.owner}: {'applied' if self.applied else 'removed'}>"
