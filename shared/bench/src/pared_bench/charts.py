"""Bars as SVG, drawn with the colours of the page around them."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from pared_bench.tables import Bar, Chart, cell

#: In pixels: the whole width, the column of labels, that of numbers, and the height of one bar's row.
WIDTH, LABELS, NUMBERS, ROW = 680, 260, 90, 24
#: Characters that fit into the column of labels.
LONGEST_LABEL = 40


def chart_svg(chart: Chart) -> str:
    """Return the chart as an inline SVG figure: bars from zero, a line over each for its spread."""
    ends = [0.0, *(end for bar in chart.bars for end in (bar.value, *(bar.spread or ())))]
    low, high = min(ends), max(ends)
    scale = (WIDTH - LABELS - NUMBERS) / ((high - low) or 1.0)

    def place(value: float) -> float:
        return LABELS + (value - low) * scale

    rows = "".join(_row(bar, index, place(0.0), place) for index, bar in enumerate(chart.bars))
    height = ROW * len(chart.bars)
    title = escape(chart.title)
    drawing = f'<svg class=chart role=img aria-label="{title}" viewBox="0 0 {WIDTH} {height}">{rows}</svg>'
    return f"<figure><h3>{title}</h3>{drawing}</figure>"


def _row(bar: Bar, index: int, zero: float, place: Callable[[float], float]) -> str:
    top, middle, end = index * ROW, index * ROW + ROW // 2, place(bar.value)
    label = bar.label if len(bar.label) <= LONGEST_LABEL else bar.label[: LONGEST_LABEL - 1] + "…"
    left, width = min(zero, end), max(abs(end - zero), 1.0)
    parts = [
        f"<title>{escape(bar.label)}: {escape(cell(bar.value))}</title>",
        f'<text x="{LABELS - 8}" y="{middle}" class=label>{escape(label)}</text>',
        f'<rect x="{left:.1f}" y="{top + 4}" width="{width:.1f}" height="{ROW - 8}" rx="2" />',
        f'<text x="{WIDTH}" y="{middle}" class=label>{escape(cell(bar.value))}</text>',
    ]
    if bar.spread is not None:
        first, last = (place(bound) for bound in bar.spread)
        parts.append(f'<line x1="{first:.1f}" x2="{last:.1f}" y1="{middle}" y2="{middle}" />')
    return f"<g>{''.join(parts)}</g>"
