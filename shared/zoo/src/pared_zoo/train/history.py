"""What a run was told each time it began or went on, so that its card can say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "history.json"
#: What may not change between the starts of one run.
FIXED = ("name", "size", "seed")


def note_start(folder: Path, start: int, facts: dict[str, Any], *, write: bool = True) -> list[dict[str, Any]]:
    """Add a start at step ``start`` with ``facts`` (name, size, seed, steps) to the history of the run in ``folder``.

    Returns the starts that count, oldest first: one that only repeats the length of the one before it adds nothing.

    Raises:
        ValueError: if the run was begun with another name, size or seed.
    """
    path = folder / FILE
    starts = json.loads(path.read_text(encoding="utf-8")) if start and path.exists() else []
    for key in FIXED:
        if starts and starts[-1][key] != facts[key]:
            raise ValueError(f"{key}={facts[key]!r} cannot resume {str(folder)!r}, begun with {starts[-1][key]!r}")
    if not starts or starts[-1]["steps"] != facts["steps"]:
        starts.append({"from_step": start, **facts})
        if write:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(starts, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
    return starts
