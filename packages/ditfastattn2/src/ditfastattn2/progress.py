"""What a calibration has decided so far, in memory and in a file that an interrupted one goes on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pared_hooks import ConfigError
from pared_hooks.files import write_whole

from ditfastattn2.plan import FULL_LETTER

SCHEMA = "pared.dfa2.calibration/1"


class Checkpoint:
    """Letters by branch, step and layer, and the errors of what was chosen by layer; `path` None keeps no file.

    Raises `ConfigError` for a file of another calibration.
    """

    def __init__(self, path: Path | None, digest: str) -> None:
        self._path = path
        self._digest = digest
        self._letters: dict[str, dict[int, dict[int, str]]] = {}
        self._errors: dict[int, list[float]] = {}
        if path is not None and path.exists():
            self._load(path)

    def letters(self, branch: str, step: int, layer: int) -> str | None:
        """Return what an earlier calibration decided here, None if it did not come so far."""
        return self._letters.get(branch, {}).get(step, {}).get(layer)

    def record(self, branch: str, step: int, layer: int, letters: str) -> None:
        """Note a decision."""
        self._letters.setdefault(branch, {}).setdefault(step, {})[layer] = letters

    def note_errors(self, layer: int, errors: Sequence[float]) -> None:
        """Note the errors of the heads of a layer at a step: their number, sum and maximum are kept."""
        known = self._errors.setdefault(layer, [0.0, 0.0, 0.0])
        known[0] += len(errors)
        known[1] += sum(errors)
        known[2] = max(known[2], *errors)

    def errors(self, layer: int) -> tuple[float, float]:
        """Return mean and maximum of a layer's errors."""
        count, total, highest = self._errors.get(layer, [0.0, 0.0, 0.0])
        return total / max(count, 1), highest

    def choices(self, num_steps: int, heads: Sequence[int]) -> dict[str, tuple[str, ...]]:
        """Return the choices as a plan holds them, for layers of so many heads; what did not run is full."""
        return {
            branch: tuple(
                " ".join(steps.get(step, {}).get(layer, FULL_LETTER * count) for layer, count in enumerate(heads))
                for step in range(num_steps)
            )
            for branch, steps in self._letters.items()
        }

    def save(self) -> None:
        """Write the file; call it between steps, when all layers have decided."""
        if self._path is None:
            return
        document = {"schema": SCHEMA, "digest": self._digest, "letters": self._letters, "errors": self._errors}
        write_whole(self._path, json.dumps(document) + "\n")

    def _load(self, path: Path) -> None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["schema"] != SCHEMA:
                raise ConfigError(f"checkpoint = {path} is not valid: a file of schema {SCHEMA}", "checkpoint")
            digest = document["digest"]
            self._letters = {
                branch: {
                    int(step): {int(layer): str(letters) for layer, letters in row.items()}
                    for step, row in steps.items()
                }
                for branch, steps in document["letters"].items()
            }
            self._errors = {int(layer): [float(one) for one in values] for layer, values in document["errors"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"checkpoint = {path} is not valid: a calibration file ({error})", "checkpoint") from None
        if digest != self._digest:
            raise ConfigError(
                f"checkpoint = {path} is not valid: it is of another model, prompts, size, steps, seed or "
                "configuration; remove it to start anew",
                "checkpoint",
            )
