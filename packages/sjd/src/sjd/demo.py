"""What `pared demo sjd` shows: a picture filling in pass by pass, beside the one that plain decoding draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pared_bench import DemoContext, DemoResult, Figure, Table
from torch import Tensor

from sjd.bench.world import GUIDANCE, Arm, Outcome, Sampling, World
from sjd.config import SJDConfig
from sjd.engine import Engine
from sjd.stats import summary

FRAMES = 8
IMAGES, FULL_IMAGES = 4, 32


@dataclass
class Film:
    """What stood in the first row behind every pass: tokens, and how many of them were final."""

    tokens: list[Tensor] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)

    def __call__(self, engine: Engine) -> None:
        tokens, committed = engine.current()
        self.tokens.append(tokens[0].clone())
        self.committed.append(committed[0])

    def frames(self, count: int) -> list[int]:
        """Numbers of `count` passes, evenly spread, the last one among them."""
        return sorted({round(one) for one in np.linspace(0, len(self.tokens) - 1, count)})


def run(
    context: DemoContext, *, prompt: str = "", window: int = 16, guidance: float = GUIDANCE, temperature: float = 1.0
) -> DemoResult:
    """Draw pictures of the zoo's world with ar-world: plain, and with speculative Jacobi decoding.

    `prompt` is a caption of yours. Raises `ConfigError` for a window outside 1..256, ValueError for a guidance or
    temperature that is not positive.
    """
    for name, value in (("guidance", guidance), ("temperature", temperature)):
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be above 0")
    SJDConfig(window=window)  # a wrong one stops here
    sampling = Sampling(guidance=guidance, temperature=temperature)
    # The same noise decides what plain decoding and "match" draw: the pictures must be equal.
    plain = Arm("plain decoding", 0, "gumbel", verify="match")
    matched = Arm("same seed, verify='match'", window, "gumbel", verify="match")
    ours = Arm("sjd", window)
    paper = Arm("sjd as in the paper", window, "independent", "random")
    images = FULL_IMAGES if context.full else IMAGES
    world = World.load(context.device, images)
    if prompt:
        world = World(world.pipeline, [prompt] * images)

    film = Film()
    tokens = {}
    for arm in (plain, matched, ours):
        engine = world.engine(arm, world.captions[:1], sampling, context.seed)
        engine.request.on_pass = film if arm is ours else None
        tokens[arm.name] = engine.run()[0][0]
        if arm is ours:
            places = engine.report().images[0].accepted_places()
    same = bool(tokens[plain.name].equal(tokens[matched.name]))
    outcomes = [
        world.draw(arm, images, context.seed, sampling, batch=1, track=context.track)
        for arm in (plain, paper, matched, ours)
    ]

    table = Table(
        f"{images} pictures, one at a time, guidance {guidance:g}, temperature {temperature:g}",
        ("decoding", "passes per picture", "tokens per pass", "time per picture", "speed-up"),
        [_row(outcome, outcomes[0]) for outcome in outcomes],
        f"A picture is {len(tokens[plain.name])} tokens. All four draw from the same distribution.",
    )
    passes = film.frames(FRAMES)
    strip = _strip(world, [film.tokens[i] for i in passes])
    pair = _strip(world, [tokens[plain.name], tokens[matched.name]], scale=4)
    picture = world.pictures(film.tokens[-1][None])[0]
    figures = [
        Figure.from_image(
            "A picture filling in",
            strip,
            f'"{world.captions[0]}": behind pass {", ".join(str(i + 1) for i in passes)}, guesses included; '
            f"final tokens: {', '.join(str(film.committed[i]) for i in passes)}.",
        ),
        Figure.from_image(
            "Plain decoding, and sjd with the same noise",
            pair,
            "Equal, token for token." if same else "The tokens differ: rounding moved one of them.",
        ),
        Figure.from_plot(
            "Which pass decided which cell", _map(picture, places, world.adapter.grammar()),
            "Colour: the pass. Dots: drawn in that pass; the other cells are guesses that were accepted.",
        ),
    ]  # fmt: skip
    base, fast = outcomes[0], outcomes[-1]
    counts = {outcome.arm.name: summary(outcome.runs) for outcome in outcomes}
    summary_text = (
        f"{_mean(fast):.0f} passes instead of {_mean(base):.0f} a picture, {base.seconds / fast.seconds:.2f} times as "
        f"fast on this machine, with {counts[fast.arm.name]['ratio']:.1f} tokens a pass. With the same noise sjd draws "
        f"{'the very picture' if same else 'nearly the picture'} that plain decoding draws."
    )
    metrics = {
        "passes": _mean(fast),
        "plain.passes": _mean(base),
        "speedup": base.seconds / fast.seconds,
        "same_tokens": float(same),
    }
    return DemoResult("sjd: the same picture in fewer passes", summary_text, [table], figures, metrics)


def _row(outcome: Outcome, plain: Outcome) -> tuple[str, str, str, str, str]:
    return (
        outcome.arm.name,
        f"{_mean(outcome):.1f}",
        f"{outcome.tokens.shape[1] / _mean(outcome):.2f}",
        f"{1e3 * outcome.seconds:.0f} ms",
        f"{plain.seconds / outcome.seconds:.2f}x",
    )


def _mean(outcome: Outcome) -> float:
    return sum(outcome.passes) / len(outcome.passes)


def _strip(world: World, rows: list[Tensor], scale: int = 2) -> np.ndarray:
    pictures = (world.pictures(torch.stack(rows)) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    gap = np.full((pictures.shape[1], 2, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)][:-1]
    return np.concatenate(parts, 1).repeat(scale, 0).repeat(scale, 1)


def _map(picture: Tensor, places: list[tuple[int, bool]], grammar: Any) -> Any:
    """The grid over the picture: passes as colours, drawn cells as dots."""
    from matplotlib.figure import Figure as Plot

    height, width = grammar.grids[-1]
    cells = grammar.cells().tolist()
    passes = np.array([places[cell][0] + 1 for cell in cells]).reshape(height, width)
    drawn = [divmod(i, width) for i, cell in enumerate(cells) if not places[cell][1]]
    plot = Plot(figsize=(9, 4), layout="constrained")
    left, right = plot.subplots(1, 2)
    left.imshow(picture.permute(1, 2, 0).cpu().numpy(), extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    shown = right.imshow(passes, cmap="viridis")
    plot.colorbar(shown, ax=right, label="pass")
    for axes in (left, right):
        axes.scatter([x for _, x in drawn], [y for y, _ in drawn], s=5, color="white", edgecolor="black", linewidth=0.3)
        axes.set_xticks([])
        axes.set_yticks([])
    return plot
