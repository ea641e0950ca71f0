"""Errors the command line shows as one message, without a traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

ELSEWHERE = "write elsewhere: --out DIR says where, for stored numbers --results DIR."


class BenchError(Exception):
    """Something the user can put right; `exit_code` is what the command ends with."""

    exit_code = 1


class UsageError(BenchError):
    """A command that was called wrongly."""

    exit_code = 2


class UnknownMethodError(UsageError, KeyError):
    """A method name that no installed package registers."""

    def __init__(self, name: str, installed: Iterable[str]) -> None:
        names = sorted(installed)
        there_are = f"Installed: {', '.join(names)}." if names else "None is installed: pip install a package first."
        super().__init__(f"no installed method is called {name!r}.{did_you_mean(name, names)} {there_are}")
        self.name = name

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0])


class MissingPartError(BenchError):
    """A method whose package does not offer the part asked for (demo, bench, cli)."""


class MissingExtraError(BenchError):
    """A part of a package that needs a distribution which is not installed."""


class OptionError(UsageError, ValueError):
    """An option that a demo or bench does not have, or a value that does not fit it."""


class DeviceError(UsageError, ValueError):
    """A device that torch does not know or this machine does not have."""


class StoreError(BenchError, ValueError):
    """A result file or a record that does not follow the schema."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the name out of `known` that looks most like `name`, nothing when none does."""
    matches = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def explain_os_error(error: OSError) -> str:
    """Say in one sentence what the operating system refused and what the user can do about it."""
    place = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: could not write{place}. Free some space, or {ELSEWHERE}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission:{place or ' the operation was refused'}. To go on, {ELSEWHERE}"
    if error.errno == errno.EROFS:
        return f"read-only file system: could not write{place}. To go on, {ELSEWHERE}"
    return f"{error.strerror or error}:{place}" if place else str(error.strerror or error)
