"""A picture of a plan: which head does what at which step."""

from __future__ import annotations

from typing import Any

from ditfastattn2.plan import FULL_LETTER, LETTERS, Plan

FULL_COLOUR, CACHED_COLOUR = "#1d3557", "#e9c46a"
ARROW_COLOURS = ("#457b9d", "#6da7bf", "#a8d5e2", "#d5ecf1")
OTHER_COLOURS = ("#e76f51", "#8d6a9f", "#7f9c6b", "#b08968")


def draw(plan: Plan, branch: str | None = None) -> Any:
    """Return a matplotlib figure: a column a step, a row a head, layers apart, one colour a method.

    `branch` is one of `plan.choices`, by default the first. Needs matplotlib, which comes with pared-bench.
    """
    import numpy as np
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = plan.choices[branch or next(iter(plan.choices))]
    known = FULL_LETTER + LETTERS[: len(plan.config.methods)]
    colours = [FULL_COLOUR, *_colours(plan)]
    numbers = np.array([[known.index(letter) for letter in row.replace(" ", "")] for row in rows]).T
    heads, steps = numbers.shape
    figure = Figure(
        figsize=(max(4.0, 0.16 * steps + 2.6), max(2.4, min(14.0, 0.09 * heads + 1.2))), layout="constrained"
    )
    axes = figure.subplots()
    norm = BoundaryNorm(np.arange(len(colours) + 1) - 0.5, len(colours))
    axes.imshow(numbers, aspect="auto", interpolation="nearest", cmap=ListedColormap(colours), norm=norm)
    edge, ticks = 0, []
    for layer in plan.layers:
        ticks.append(edge + layer.heads / 2 - 0.5)
        edge += layer.heads
        axes.axhline(edge - 0.5, color="white", linewidth=0.8)
    axes.set(xlabel="step", ylabel="layer, head by head", yticks=ticks)
    axes.set_yticklabels([layer.name for layer in plan.layers], fontsize=6)
    labels = ["full", *plan.config.methods]
    entries = [Patch(facecolor=colour, label=label) for colour, label in zip(colours, labels, strict=True)]
    figure.legend(handles=entries, loc="outside right upper", fontsize=7, frameon=False)
    axes.set_title(f"{1 - plan.kept():.0%} of attention removed, delta {plan.config.delta:g}", fontsize=9)
    return figure


def _colours(plan: Plan) -> list[str]:
    """Return a colour for each method: warm for reuse, pale blue for narrow arrows, others apart."""
    arrows, others = iter(ARROW_COLOURS), iter(OTHER_COLOURS * 13)
    chosen = []
    for method in plan.config.parsed_methods():
        if method.kind == "cached":
            chosen.append(CACHED_COLOUR)
        elif method.kind == "arrow" and not (method.reorder or method.shares_guidance or method.residual):
            chosen.append(next(arrows, None) or next(others))
        else:
            chosen.append(next(others))
    return chosen
