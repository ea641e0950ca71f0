"""What the measurements say about the claims of section 10: each as one margin, at least 0 where the claim holds.

Ways that remove a little more or less than the plan they are compared with meet the plans at their own cost, on the
line between those of neighbouring deltas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from pared_bench import Record

from ditfastattn2.bench.quality import ARROWS_ALONE, DELTAS
from ditfastattn2.bench.world import MODEL, STEPS

EXPERIMENTS = ("quality", "transfer", "patterns")
LOCAL_HEADS = 0.25
"""Share of the heads that must keep most of the picture's attention to itself near."""

AT_EQUAL_COST = (
    ("whole layers", 1.0, "heads are 1 dB closer than whole layers"),
    ("one window", 0.0, "heads are closer than one window for all"),
    ("all reused", 0.0, "heads are closer than reusing all attention at some steps"),
    ("PAB of diffusers", 0.0, "heads are closer than Pyramid Attention Broadcast"),
    ("same methods, random heads", 3.0, "heads are 3 dB closer than random heads of the same methods"),
)
"""Begin of a variant's name, how many dB the plans must be closer, and the claim."""

Values = dict[str, dict[str, float]]


def claims(records: Iterable[Record]) -> list[Record]:
    """The margins that can be told from `records` of the other experiments."""
    values: Values = defaultdict(dict)
    for record in records:
        if record.value is not None and record.settings.get("experiment") in EXPERIMENTS:
            values[record.metric][record.variant] = record.value
    result = []
    for claim, margin, needed, unit in (*_of_heads(values), *_of_plans(values), *_of_windows(values)):
        settings = {"experiment": "claims", "model": MODEL, "needed": needed}
        result.append(Record("ditfastattn2", claim, "margin", margin - needed, unit, settings))
    return result


# Each yields claim, value, what is needed, and unit.


def _of_heads(values: Values) -> Iterator[tuple[str, float, float, str]]:
    """What the method rests on: many heads look near, whatever the prompt, and others do not."""
    for share in values["local_share"].values():
        yield "a quarter of the heads look near", share, LOCAL_HEADS, ""
    prompts = values["band_mass_deviation"].get("all heads")
    for heads in values["band_mass_deviation_of_heads"].values():
        if prompts is not None:
            yield "how near a head looks differs more between heads than between prompts", heads - prompts, 0.0, ""


def _of_plans(values: Values) -> Iterator[tuple[str, float, float, str]]:
    """Plans against other ways to spend as much attention, and against each other."""
    psnr, removed = values["psnr"], values["attention_removed"]
    curve = [(f"delta {delta:g}", delta) for delta in DELTAS if f"delta {delta:g}" in psnr]
    if len(curve) > 2:
        by_cost = [(removed[name], psnr[name]) for name, _ in curve]
        for other, needed, claim in AT_EQUAL_COST:
            variant = next((name for name in psnr if name.startswith(other) and "stripes" not in name), None)
            if variant is not None:
                yield claim, _interpolated(by_cost, removed[variant]) - psnr[variant], needed, "dB"
        deltas = [delta for _, delta in curve]
        falls = -_spearman(deltas, [psnr[name] for name, _ in curve])
        rises = _spearman(deltas, [removed[name] for name, _ in curve])
        yield "distance grows with delta (rank correlation)", falls, 0.95, ""
        yield "what is removed grows with delta (rank correlation)", rises, 0.95, ""
    arrows = next((name for name in psnr if name.endswith(f", {ARROWS_ALONE}")), None)
    if arrows is not None and len(curve) > 1:
        at_equal = _interpolated([(psnr[name], removed[name]) for name, _ in curve], psnr[arrows])
        yield "reuse removes 1.3 times more at the distance of arrows alone", at_equal / removed[arrows], 1.3, "x"
        steps = next((name for name in psnr if name.endswith(f"steps of {STEPS}")), None)
        if steps is not None:
            heads = psnr[arrows.removesuffix(f", {ARROWS_ALONE}")]
            yield "heads are closer than fewer steps", heads - psnr[steps], 0.0, "dB"
    own, others = psnr.get("plan of these prompts"), psnr.get("plan of other prompts")
    if own is not None and others is not None:
        yield "a plan of other prompts is within 0.5 dB", others - own, -0.5, "dB"


def _of_windows(values: Values) -> Iterator[tuple[str, float, float, str]]:
    """Whether windows need whole text stripes."""
    psnr, accuracy = values["psnr"], values["accuracy"]
    bare = next((name for name in psnr if name.endswith("no text stripes")), None)
    if bare is not None:
        whole = bare.replace(", no text stripes", " for all")
        yield "windows without text stripes lose 3 dB", psnr[whole] - psnr[bare], 3.0, "dB"
        yield "windows without text stripes lose 10 points of accuracy", accuracy[whole] - accuracy[bare], 0.1, ""


def _interpolated(points: list[tuple[float, float]], x: float) -> float:
    """Value at `x` on the line through points (x, y), the nearest end beyond them."""
    points = sorted(points)
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1e-12)
    return points[-1][1]


def _spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(values: list[float]) -> list[float]:
        return [
            sum(other < one for other in values) + (sum(other == one for other in values) - 1) / 2 for one in values
        ]

    a, b = ranks(first), ranks(second)
    mean = (len(a) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    scale = (sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)) ** 0.5
    return covariance / scale if scale else 0.0
