"""What a head can do at a step: attend in full, within an arrow, or repeat its output of the step before."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pared_hooks import ConfigError

KNOWN = "cached, cached_cfg, arrow:a/b and reorder_arrow:a/b, the last two also with +cfg or +residual behind them"
_PATTERN = re.compile(
    r"(?P<kind>full|cached|arrow|reorder_arrow)(?::(?P<a>\d+)/(?P<b>\d+))?(?P<options>(?:\+(?:cfg|residual))*)"
)


@dataclass(frozen=True)
class Method:
    """One method of a head, parsed from its name.

    `fraction` (a, b) is the width of an arrow's band as a share of the vision tokens. `reorder` runs it with frames
    side by side, `shares_guidance` computes the conditional half of a guidance batch and copies it to the other,
    `residual` adds what the arrow lacked at the last full step.
    """

    name: str
    kind: Literal["full", "cached", "arrow"]
    fraction: tuple[int, int] | None = None
    reorder: bool = False
    shares_guidance: bool = False
    residual: bool = False

    def window(self, num_vision: int) -> int:
        """Half width of the band, w = floor(floor(V a / b) / 2); -1 for full, 0 for cached (the kernel's numbers).

        Raises `ConfigError` where the band would be empty.
        """
        if self.fraction is None:
            return -1 if self.kind == "full" else 0
        a, b = self.fraction
        window = num_vision * a // b // 2
        if window == 0:
            raise ConfigError(
                f"methods: {self.name!r} is not valid for {num_vision} vision tokens, its band is empty", "methods"
            )
        return window

    def saving(self, num_vision: int, num_text: int) -> float:
        """Share of a full head's attention that the planner counts as saved (section 3.1)."""
        if self.kind == "cached":
            return 1.0
        saved = 0.0
        if self.kind == "arrow":
            saved = (num_vision - self.window(num_vision)) ** 2 / (num_vision + num_text) ** 2
        return 1 - (1 - saved) / 2 if self.shares_guidance else saved


FULL = Method("full", "full")


def parse(name: str) -> Method:
    """Return the method called `name`, such as "cached", "arrow:1/8" or "reorder_arrow:1/16+cfg".

    Raises `ConfigError` for an unknown one, with those that are known.
    """
    found = _PATTERN.fullmatch("full+cfg" if name == "cached_cfg" else name) if isinstance(name, str) else None
    if found is None:
        raise _unknown(name)
    kind, options = found["kind"], found["options"].split("+")[1:]
    is_arrow = kind.endswith("arrow")
    if is_arrow != (found["a"] is not None) or len(set(options)) < len(options):
        raise _unknown(name)
    if ("residual" in options and not is_arrow) or ("cfg" in options and kind == "cached"):
        raise _unknown(name)
    fraction = None
    if is_arrow:
        fraction = int(found["a"]), int(found["b"])
        if not 0 < fraction[0] < fraction[1]:
            raise ConfigError(f"methods: {name!r} is not valid: the band of an arrow is a share a/b with 0 < a < b")
    return Method(
        name=name,
        kind="arrow" if is_arrow else kind,  # type: ignore[arg-type]
        fraction=fraction,
        reorder=kind == "reorder_arrow",
        shares_guidance="cfg" in options,
        residual="residual" in options,
    )


def _unknown(name: object) -> ConfigError:
    return ConfigError(f"methods: {name!r} is not valid; known: {KNOWN}", "methods")
