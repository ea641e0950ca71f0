"""Plans with the method histograms of the paper, for full-size models whose random weights no calibration can judge."""

from __future__ import annotations

import random
from typing import Any

from pared_hooks import DenoiserView

from ditfastattn2.adapters.base import heads_of, sites_of
from ditfastattn2.config import DiTFastAttnV2Config
from ditfastattn2.functional import plan_density
from ditfastattn2.plan import LayerPlan, Plan, digest_of

REUSED_SHARE = 0.5
"""Of what is removed, the share that reuse removes; arrows remove the rest (the paper removes 0.30 without reuse, 0.55
with it)."""


def plan_for(
    model: Any, *, num_vision: int, num_text: int, steps: int, removed: float | str, seed: int = 0, **options: Any
) -> Plan:
    """Return a plan of a model that removes about the share `removed`, or "arrows": 1/32 everywhere, or "cached"."""
    config = DiTFastAttnV2Config(**options)
    layers = tuple(LayerPlan(site.name, heads_of(site), site.text) for site in sites_of(DenoiserView.of(model)))
    shares = _shares(config, num_vision, num_text, layers[0].text == "first", steps, removed)
    draw = random.Random(seed)

    def row(step: int) -> str:
        if step == 0:
            return " ".join("-" * layer.heads for layer in layers)
        letters, weights = "-abcd", shares
        return " ".join("".join(draw.choices(letters, weights, k=layer.heads)) for layer in layers)

    return Plan(
        model=type(model).__name__,
        model_digest=digest_of(model),
        layers=layers,
        num_vision=num_vision,
        num_text=num_text,
        num_steps=steps,
        config=config,
        choices={"cond": tuple(row(step) for step in range(steps))},
    )


def windows_for(
    heads: int, *, num_vision: int, num_text: int, text_first: bool, removed: float, seed: int = 0
) -> list[int]:
    """Return windows of one layer that remove about the share `removed`: skipped heads, arrows, full ones."""
    config = DiTFastAttnV2Config()
    _, cached, *arrows = _shares(config, num_vision, num_text, text_first, None, removed)
    counts = [round(share * heads) for share in (cached, *arrows)]
    while sum(counts) > heads:
        counts[counts.index(max(counts))] -= 1
    windows = [method.window(num_vision) for method in config.parsed_methods()]
    dealt = [window for window, count in zip(windows, counts, strict=True) for _ in range(count)]
    dealt += [-1] * (heads - len(dealt))
    random.Random(seed).shuffle(dealt)
    return dealt


def _shares(
    config: DiTFastAttnV2Config,
    num_vision: int,
    num_text: int,
    text_first: bool,
    steps: int | None,
    removed: float | str,
) -> list[float]:
    """Shares of full, cached and the three arrows."""
    if removed == "arrows":
        return [0.0, 0.0, 0.0, 0.0, 1.0]
    if removed == "cached":
        return [0.0, 1.0, 0.0, 0.0, 0.0]
    assert isinstance(removed, float)
    # The first step removes nothing.
    target = removed if steps is None else min(1.0, removed * steps / (steps - 1))
    arrows = config.parsed_methods()[1:]
    gains = [
        1 - plan_density([method.window(num_vision)], num_vision, num_text, text_first, config.mask_block)
        for method in arrows
    ]
    mean_gain = sum(gains) / len(gains)
    reused = REUSED_SHARE * target
    if target - reused > mean_gain * (1 - reused):
        # Not even arrows in all other heads suffice: more heads are reused.
        reused = (target - mean_gain) / (1 - mean_gain)
        banded = 1 - reused
    else:
        banded = (target - reused) / mean_gain if mean_gain else 0.0
    return [1 - reused - banded, reused, *(banded / 3 for _ in arrows)]
