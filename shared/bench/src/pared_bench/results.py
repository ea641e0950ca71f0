"""What a demo shows and what a bench measures."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """A titled table; `rows` hold strings, numbers or None (shown as a dash), one cell per column.

    Raises ValueError when a row's length differs from the number of columns.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"rows[{index}] of table {self.title!r} has {len(row)} cells for {len(self.columns)} columns"
                )


@dataclass(frozen=True)
class Figure:
    """A picture as PNG bytes, with a title above and a caption below. Raises ValueError when `png` is not a PNG."""

    title: str
    png: bytes
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.png.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"png of figure {self.title!r} is not PNG data: it starts with {self.png[:8]!r}")

    @classmethod
    def from_image(cls, title: str, image: Any, caption: str = "") -> Figure:
        """Encode a PIL image, or a uint8 array (height, width), (height, width, 3) or (height, width, 4)."""
        from PIL import Image

        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        return cls(title, buffer.getvalue(), caption)

    @classmethod
    def from_plot(cls, title: str, plot: Any, caption: str = "", dpi: int = 140) -> Figure:
        """Encode a matplotlib figure at `dpi` dots per inch."""
        buffer = io.BytesIO()
        plot.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
        return cls(title, buffer.getvalue(), caption)


@dataclass(frozen=True)
class DemoResult:
    """What a demo hands back: a paragraph, tables, pictures, and its headline numbers by name."""

    title: str
    summary: str
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One measured number and what it was measured on.

    Records with equal `method`, `variant`, `metric` and `settings` describe the same measurement: in a store the newer
    replaces the older. `settings` hold JSON values (strings, numbers, booleans, None, flat lists); the setting
    "experiment" names the section of the report a record appears in. `value` None means that the number could not be
    measured, and `note` must say why. `spread` is (low, high) in the unit of the value, over `samples` repetitions.

    Raises ValueError naming the field when a value is not finite, a name is empty, or a setting is not a JSON value.
    """

    method: str
    variant: str
    metric: str
    value: float | None
    unit: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    spread: tuple[float, float] | None = None
    samples: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("method", "variant", "metric"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text:
                raise ValueError(f"{name} must be a non-empty string, got {text!r}")
        if not isinstance(self.unit, str):
            raise ValueError(f"unit must be a string ('' for a pure number), got {self.unit!r}")
        if self.value is None:
            if not self.note:
                raise ValueError(f"value of {self.metric!r} is None: note must say why it could not be measured")
        else:
            object.__setattr__(self, "value", _finite("value", self.metric, self.value))
        if self.spread is not None:
            low, high = (_finite("spread", self.metric, bound) for bound in self.spread)
            if low > high:
                raise ValueError(f"spread of {self.metric!r} must be (low, high), got {self.spread!r}")
            object.__setattr__(self, "spread", (low, high))
        if self.samples is not None and (not isinstance(self.samples, int) or self.samples < 1):
            raise ValueError(
                f"samples of {self.metric!r} must be an integer of at least 1 or None, got {self.samples!r}"
            )
        object.__setattr__(self, "settings", {str(key): _plain(key, item) for key, item in self.settings.items()})

    def key(self) -> tuple[str, str, str, str]:
        """Return what identifies the measurement: method, variant, metric, and the settings as canonical JSON."""
        return (self.method, self.variant, self.metric, json.dumps(self.settings, sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "method": self.method,
            "variant": self.variant,
            "metric": self.metric,
            "value": self.value,
            "unit": self.unit,
            "settings": dict(self.settings),
            "spread": None if self.spread is None else list(self.spread),
            "samples": self.samples,
            "note": self.note,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Rebuild a record from `to_dict`; raises ValueError naming an unknown or missing key."""
        known = {"method", "variant", "metric", "value", "unit", "settings", "spread", "samples", "note"}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"a record has no field {unknown[0]!r}; its fields are {', '.join(sorted(known))}")
        if missing := sorted({"method", "variant", "metric", "value", "unit"} - set(data)):
            raise ValueError(f"a record needs the field {missing[0]!r}")
        spread = data.get("spread")
        return cls(**{**data, "spread": None if spread is None else (spread[0], spread[1])})


def _finite(name: str, metric: str, number: Any) -> float:
    try:
        value = float(number)
    except (TypeError, ValueError):
        raise ValueError(f"{name} of {metric!r} must be a number, got {number!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} of {metric!r} must be finite, got {value}; use None with a note for an absent number")
    return value


def _plain(key: Any, item: Any) -> Any:
    if isinstance(item, (list, tuple)):
        return [_plain(key, element) for element in item]
    if item is None or isinstance(item, (str, bool, int)):
        return item
    if isinstance(item, float) and math.isfinite(item):
        return item
    raise ValueError(f"settings[{key!r}] must be a string, finite number, boolean, None or list of these, got {item!r}")
