"""What is redundant in one clip for one model: similarities at every stage, tokens by layer, and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from framefusion.apply import FrameFusionHandle, install
from framefusion.config import FrameFusionConfig
from framefusion.film import draw_tokens, grid_shape, processor_inputs, states_of_tokens
from framefusion.functional import adjacent_similarity, predecessor
from framefusion.functional.decision import Budget
from framefusion.functional.reducer import Reducer
from framefusion.functional.selection import Selection
from framefusion.layout import TokenLayout
from framefusion.request import StageTrace

if TYPE_CHECKING:
    from PIL.Image import Image

BINS = (-1.0, 0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.01)
WIDTH = 40


@dataclass
class Inspection:
    """Numbers of one prompt."""

    histograms: list[list[float]]
    """By stage: share of the tokens with a predecessor whose cosine lies in each of `BINS`."""
    trace: list[StageTrace]
    stats: dict[str, Any]
    picture: Image | None
    """The frames with their tokens."""

    def lines(self) -> Iterator[str]:
        """What the command prints."""
        for stage, (shares, one) in enumerate(zip(self.histograms, self.trace, strict=False)):
            yield f"stage {stage}: {one.kind[0]}, {one.before[0]} -> {one.after[0]} vision tokens"
            for low, high, share in zip(BINS[:-1], BINS[1:], shares, strict=True):
                yield f"  {low:5.2f} to {min(high, 1.0):4.2f} {share:6.1%} {'#' * round(WIDTH * share)}"
        tokens = ", ".join(f"{count:.0f}" for count in self.stats["attention_tokens"])
        yield f"vision tokens in the attention of each layer: {tokens}"
        yield f"cost {self.stats['cost']:.3f}, FLOPs of the prefill {self.stats['flops_ratio']:.1%} of the dense ones"


@dataclass
class Watching(Reducer):
    """A reducer that notes the similarities each merge stage sees."""

    histograms: list[list[float]] = field(default_factory=list)

    def step(self, hidden: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Selection | None]:
        """As `Reducer.step`."""
        similarity = adjacent_similarity(hidden, predecessor(self.patch, self.stream))[0].cpu()
        paired = similarity[similarity > -2].clamp(-1, 1)
        counts = torch.histogram(paired.float(), torch.tensor(BINS)).hist
        self.histograms.append((counts / max(len(paired), 1)).tolist())
        return super().step(hidden, importance)


@torch.no_grad()
def inspect_film(model: Any, processor: Any, film: np.ndarray, question: str, config: FrameFusionConfig) -> Inspection:
    """Run one prompt about a film (frames, height, width, 3) uint8 and note what each stage sees and does."""
    device = next(model.parameters()).device
    inputs = processor_inputs(processor, film, question, device)
    watched: list[Watching] = []

    def strategy(layout: TokenLayout, valid: Tensor | None, budgets: list[Budget]) -> Reducer:
        layers = budgets[0].num_layers
        watched.append(Watching(config, layout.patch, layout.stream, layers, valid, budgets))
        return watched[-1]

    with install(model, config, strategy, None, "framefusion.inspect") as handle:
        model(**inputs, logits_to_keep=1)
        grid = token_states(handle, film.shape[2], film.shape[1])
        histograms = watched[0].histograms if watched else []
        picture = None if grid is None else draw_tokens(pictures_of(film, len(grid)), grid)
        return Inspection(histograms, handle.trace, handle.stats(), picture)


def pictures_of(film: np.ndarray, count: int) -> np.ndarray:
    """One picture for each of `count` frames of tokens, which may stand for several pictures each."""
    return film[np.linspace(0, len(film) - 1, count).round().astype(int)]


def token_states(handle: FrameFusionHandle, width: int, height: int) -> Tensor | None:
    """(frames, rows, columns): what became of each token of the last prompt's first video; None without one."""
    layout, kept, groups = handle.layout, handle.kept, handle.groups
    if layout is None or kept is None or groups is None:
        return None
    places = ((layout.stream[0] == 0) & (layout.patch[0] >= 0)).nonzero().flatten().cpu()
    frame, patch = layout.frame[0].cpu()[places], layout.patch[0].cpu()[places]
    patches = int(patch.max()) + 1
    states = torch.zeros(int(frame.max()) + 1, patches, dtype=torch.long)
    states[frame, patch] = states_of_tokens(kept[0].cpu(), groups[0].cpu(), places)
    return states.view(len(states), *grid_shape(patches, width, height))
