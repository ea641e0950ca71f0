"""The exceptions every pared package raises, so that a caller can catch one family."""

from __future__ import annotations

from collections.abc import Iterable


class ParedError(Exception):
    """Base of all errors raised by the pared packages."""


class ConfigError(ParedError, ValueError):
    """A configuration value is wrong; `field` names which one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str | None]]:
        return type(self), (str(self), self.field)


class UnsupportedModelError(ParedError, ValueError):
    """The model's architecture, or something it is combined with, is not known to the method."""

    @classmethod
    def unknown(cls, found: object, supported: Iterable[str], remedy: str) -> UnsupportedModelError:
        """Build the message that names what was found, what is supported and how to support more."""
        kind = found if isinstance(found, type) else type(found)
        names = ", ".join(sorted(supported)) or "nothing"
        return cls(f"{kind.__module__}.{kind.__qualname__} is not supported. Supported: {names}. {remedy}")


class ConflictError(ParedError, ValueError):
    """Two methods claim the same site of a model in ways that cannot both hold."""


class AlreadyAppliedError(ConflictError):
    """The same method is already applied to this site of the model."""
