"""A causal model that is a table of counts: pictures of the world in 16 x 16 cells of 64 colours.

p(colour | left, above), counted on rendered scenes, with the counts of shorter contexts where a pair is rare. It has no
network, so that passes of every rule and window are counted in seconds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from pared_bench import BenchContext, Record
from torch import Tensor

from sjd.config import SJDConfig
from sjd.exactness import make_window
from sjd.grammar import ImageGrammar

SIDE, COLOURS = 16, 64
SCENES, SEED = 4000, 77_000
PRIOR = 4.0
"""Weight of the shorter context, in counts."""
COLUMNS = {
    "independent, random": ("independent", "random", "speculative"),
    "independent, left": ("independent", "left", "speculative"),
    "independent, above": ("independent", "above", "speculative"),
    "maximal, above": ("maximal", "above", "speculative"),
    "gumbel, left": ("gumbel", "left", "speculative"),
    "gumbel, match, above": ("gumbel", "above", "match"),
}
WINDOWS = (4, 8, 16, 32)
TEMPERATURES = (1.0, 1.4)
"""The world as it is, where most cells are nearly certain, and one with several times as many nats a cell."""


@dataclass
class CountModel:
    """`table` (65, 65, 64) float32: distribution for each pair of left and upper colour, 64 beyond the border."""

    table: Tensor
    vocab: int = COLOURS
    length: int = SIDE * SIDE

    @classmethod
    def of_world(cls, scenes: int = SCENES) -> CountModel:
        """Count rendered scenes."""
        tokens = world_tokens(scenes, SEED)
        left, above = _neighbours(tokens)
        pairs = torch.zeros(COLOURS + 1, COLOURS + 1, COLOURS)
        pairs.index_put_((left.flatten(), above.flatten(), tokens.flatten()), torch.tensor(1.0), accumulate=True)
        alone = pairs.sum((0, 1)) + 1
        law = alone / alone.sum()
        by_above = pairs.sum(0) + PRIOR * law
        by_above = by_above / by_above.sum(-1, keepdim=True)
        table = pairs + PRIOR * by_above
        return cls(table / table.sum(-1, keepdim=True))

    def heated(self, temperature: float) -> CountModel:
        """The same with p ** (1 / temperature), normalised."""
        table = self.table ** (1 / temperature)
        return CountModel(table / table.sum(-1, keepdim=True))

    def probs(self, known: Tensor, positions: Tensor) -> Tensor:
        """Distributions (rows, width, colours) at these positions, the cells in front taken from `known`."""
        left = known.gather(1, (positions - 1).clamp(min=0))
        above = known.gather(1, (positions - SIDE).clamp(min=0))
        left = torch.where(positions % SIDE == 0, COLOURS, left)
        above = torch.where(positions < SIDE, COLOURS, above)
        return self.table[left, above]

    def entropy(self, tokens: Tensor) -> float:
        """Mean entropy in nats of the distributions of these pictures (images, cells)."""
        positions = torch.arange(self.length).expand(len(tokens), -1)
        return float(torch.special.entr(self.probs(tokens, positions)).sum(-1).mean())


def world_tokens(scenes: int, seed: int) -> Tensor:
    """Scenes as colours of cells (scenes, 256) int64, two bits a channel."""
    from pared_zoo.world import SceneDistribution, render, sample_scenes

    pictures = torch.from_numpy(render(sample_scenes(scenes, seed, SceneDistribution()), 64)).float()
    cells = torch.nn.functional.avg_pool2d(pictures.permute(0, 3, 1, 2), 4).round().long().clamp(0, 255) >> 6
    return (cells[:, 0] * 16 + cells[:, 1] * 4 + cells[:, 2]).flatten(1)


def passes(model: CountModel, config: SJDConfig, images: int, seed: int) -> tuple[list[int], Tensor]:
    """Passes of each of `images` pictures drawn at once, and their tokens (images, cells)."""
    generator = torch.Generator().manual_seed(seed)
    grammar = ImageGrammar([(SIDE, SIDE)], slice(0, COLOURS))
    window = make_window(
        model, images, config, lambda shape: torch.rand(shape, generator=generator, dtype=torch.float64),
        grammar=grammar,
    )  # fmt: skip
    counts = torch.zeros(images, dtype=torch.int64)
    while bool((alive := window.committed < window.ends).any()):
        counts += alive
        window.advance(model.probs(window.known, window.positions()))
    return counts.tolist(), window.known[:, : model.length]


def run(context: BenchContext, images: int) -> list[Record]:
    """Ratio of tokens to passes, for every column, window and temperature."""
    world = CountModel.of_world()
    work = [(temperature, name) for temperature in TEMPERATURES for name in COLUMNS]
    records = []
    for temperature, name in context.track(work, "count model"):
        model = world.heated(temperature)
        for window, (ratios, entropy) in row(model, name, images, context.seed).items():
            settings = {
                "experiment": "count model",
                "temperature": temperature,
                "window": window,
                "images": images,
                "entropy of what is drawn": round(entropy, 3),
            }
            mean = statistics.fmean(ratios)
            records.append(Record("sjd", name, "tokens per pass", mean, "", settings, samples=images))
    return records


def row(model: CountModel, name: str, images: int, seed: int) -> dict[int, tuple[list[float], float]]:
    """By window: tokens per pass of each picture drawn as the column `name` says, and the entropy of what was drawn."""
    refresh, init, verify = COLUMNS[name]
    found = {}
    for window in WINDOWS:
        config = SJDConfig.from_dict(
            {"window": window, "refresh": refresh, "init": init, "verify": verify, "seed": seed}
        )  # fmt: skip
        counts, tokens = passes(model, config, images, seed)
        found[window] = [model.length / count for count in counts], model.entropy(tokens)
    return found


def _neighbours(tokens: Tensor) -> tuple[Tensor, Tensor]:
    grid = tokens.view(-1, SIDE, SIDE)
    left = torch.nn.functional.pad(grid, (1, 0), value=COLOURS)[:, :, :-1]
    above = torch.nn.functional.pad(grid, (0, 0, 1, 0), value=COLOURS)[:, :-1]
    return left.flatten(1), above.flatten(1)
