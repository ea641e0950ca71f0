"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` by way of a temporary name, so that no reader ever sees half a file.

    Missing parent folders are made. Raises OSError; nothing is left behind then, and an older file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        # the temporary name would mean nothing to the reader of the message
        raise OSError(error.errno, error.strerror, str(path)) from error


def writable_folder(path: Path) -> Path:
    """Make the folder where it is missing, try whether it can be written to, and return it; raises OSError if not."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"0")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return path


@contextlib.contextmanager
def own_folder(path: Path) -> Iterator[Path]:
    """Give the folder to one run and take it away afterwards, however that ended, when the run wrote nothing there."""
    writable_folder(path)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()


def _umask() -> int:
    # there is no call that reads the mask without setting it
    mask = os.umask(0)
    os.umask(mask)
    return mask
