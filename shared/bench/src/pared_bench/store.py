"""Measured numbers on disk: benchmarks/results/<device>/<package>.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pared_bench.environment import Environment
from pared_bench.errors import StoreError
from pared_bench.files import atomic_write
from pared_bench.registry import workspace_root
from pared_bench.results import Record

SCHEMA = "pared.results/1"


@dataclass(frozen=True)
class StoredRecord:
    """A record with the package it belongs to and the environment it was measured in."""

    package: str
    record: Record
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as it stands in a result file."""
        return {**self.record.to_dict(), "environment": self.environment.to_dict()}


class ResultStore:
    """The result files under one folder; without `root`, benchmarks/results of the checkout or the current folder."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = default_root() if root is None else Path(root)

    def path(self, device: str, package: str) -> Path:
        """Return the file of a package on a device (its slug). Raises StoreError when a name is no plain file name."""
        for name, value in (("device", device), ("package", package)):
            if not value or Path(value).name != value or value.startswith("."):
                raise StoreError(f"{name} must be a plain file name, got {value!r}")
        return self.root / device / f"{package}.json"

    def add(self, package: str, records: Iterable[Record], environment: Environment) -> Path:
        """Merge `records` into the package's file on the environment's device and return the file.

        A record replaces an older one of the same method, variant, metric and settings. Raises StoreError when the file
        that is there does not follow the schema, OSError when it cannot be written; the older file is untouched then.
        """
        path = self.path(environment.slug, package)
        merged = {entry.record.key(): entry for entry in self._read(path)} if path.exists() else {}
        for record in records:
            # removed first, so that what was measured together stands together
            merged.pop(record.key(), None)
            merged[record.key()] = StoredRecord(package, record, environment)
        document = {
            "schema": SCHEMA,
            "package": package,
            "device": environment.slug,
            "records": [entry.to_dict() for entry in merged.values()],
        }
        validate(document, path)
        atomic_write(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path

    def merge(self, other: ResultStore) -> list[Path]:
        """Take over every record of another store (measured on another machine) and return the files that changed."""
        changed = []
        for entry_path in sorted(other.root.glob("*/*.json")):
            for entry in other._read(entry_path):
                path = self.add(entry.package, [entry.record], entry.environment)
                changed += [path] if path not in changed else []
        return changed

    def load(self, package: str | None = None, device: str | None = None) -> list[StoredRecord]:
        """Return the stored records of a package and a device (None: of all), files in alphabetical order."""
        pattern = f"{device or '*'}/{package or '*'}.json"
        return [entry for path in sorted(self.root.glob(pattern)) for entry in self._read(path)]

    def devices(self) -> list[str]:
        """Return the devices (their slugs) that have results of any package."""
        return sorted({path.parent.name for path in self.root.glob("*/*.json")})

    def packages(self) -> list[str]:
        """Return the packages that have results on any device."""
        return sorted({path.stem for path in self.root.glob("*/*.json")})

    def _read(self, path: Path) -> list[StoredRecord]:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{path} is not JSON: {error}") from None
        validate(document, path)
        return [_entry(document["package"], item, path) for item in document["records"]]


def default_root() -> Path:
    """Return where results belong when nobody says otherwise."""
    return (workspace_root() or Path.cwd()) / "benchmarks" / "results"


def schema() -> dict[str, Any]:
    """Return the JSON schema of a result file."""
    return dict(json.loads(Path(__file__).with_name("results.schema.json").read_text(encoding="utf-8")))


def validate(document: Any, path: Path | str = "document") -> None:
    """Check a result document; raises StoreError that names the file and the place.

    Where jsonschema is not installed (a bare GPU machine), only what `Record` and `Environment` check is checked.
    """
    try:
        import jsonschema
    except ModuleNotFoundError:
        _validate_by_hand(document, path)
        return
    errors = sorted(jsonschema.Draft202012Validator(schema()).iter_errors(document), key=lambda error: list(error.path))
    if errors:
        place = "/".join(str(step) for step in errors[0].absolute_path) or "the document"
        raise StoreError(f"{path} does not follow {SCHEMA}: {place}: {errors[0].message}")


def _validate_by_hand(document: Any, path: Path | str) -> None:
    if (
        not isinstance(document, dict)
        or document.get("schema") != SCHEMA
        or not isinstance(document.get("records"), list)
    ):
        raise StoreError(f"{path} does not follow {SCHEMA}")
    for item in document["records"]:
        _entry(str(document.get("package")), item, path)


def _entry(package: str, item: Any, path: Path | str) -> StoredRecord:
    try:
        fields = dict(item)
        environment = Environment(**fields.pop("environment"))
        return StoredRecord(package, Record.from_dict(fields), environment)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} does not follow {SCHEMA}: {error}") from None
