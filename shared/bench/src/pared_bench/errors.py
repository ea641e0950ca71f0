"""Errors the command line shows as one message, without a traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class BenchError(Exception):
    """Something the user can put right; `exit_code` is what the command ends with."""

    exit_code = 1


class UnknownMethodError(BenchError, KeyError):
    """A method name that no installed package registers."""

    exit_code = 2

    def __init__(self, name: str, installed: Iterable[str]) -> None:
        names = sorted(installed)
        message = f"no installed method is called {name!r}"
        if nearest := nearest_name(name, names):
            message += f"; did you mean {nearest!r}?"
        message += (
            f" Installed: {', '.join(names)}." if names else " No method is installed: pip install a package first."
        )
        super().__init__(message)
        self.name = name
        self.nearest = nearest

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0])


class MissingPartError(BenchError):
    """A method whose package does not offer the part asked for (demo, bench, cli)."""


class MissingExtraError(BenchError):
    """A part of a package that needs a distribution which is not installed."""


class OptionError(BenchError, ValueError):
    """An option that a demo or bench does not have, or a value that does not fit it."""

    exit_code = 2


class DeviceError(BenchError, ValueError):
    """A device that torch does not know or this machine does not have."""

    exit_code = 2


class StoreError(BenchError, ValueError):
    """A result file or a record that does not follow the schema."""


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the name out of `known` that looks most like `name`, or None when none does."""
    matches = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def explain_os_error(error: OSError) -> str:
    """Say in one sentence what the operating system refused and what the user can do about it."""
    place = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: could not write{place}. Free some space, or write elsewhere with --out DIR."
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"no permission:{place or ' the operation was refused'}. Choose a folder you may write to with --out DIR."
        )
    if error.errno == errno.EROFS:
        return f"read-only file system: could not write{place}. Choose another folder with --out DIR."
    return f"{error.strerror or error}:{place}" if place else str(error.strerror or error)
