"""A claim as a margin: positive where it holds here, by stream of clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pared_bench import Record


def claim(name: str, margins: Sequence[float], settings: dict[str, Any]) -> Record:
    """The mean of the margins with their spread, and whether the claim is reproduced: on the average, and everywhere.

    The name must not depend on the outcome: the record of a later run replaces that of an earlier one.
    """
    mean = sum(margins) / len(margins)
    everywhere = "in every stream" if min(margins) > 0 else "not in every stream"
    verdict = f"reproduced, {everywhere}" if mean > 0 else "not reproduced"
    verdict = verdict.removesuffix(", in every stream") if len(margins) == 1 else verdict
    spread = (min(margins), max(margins))
    return Record("framefusion", name, "margin", mean, "", settings, spread, len(margins), note=verdict)
