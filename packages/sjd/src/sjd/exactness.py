"""The law of the output, not asserted but computed: every random choice on models small enough to enumerate.

A model is a table of p(x | prefix). The choices of a pass are the outcome of each test and the token of each draw; each
is taken with its probability, through the `Window` that generation uses, and equal states are merged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sjd.config import SJDConfig
from sjd.functional import residual_probs
from sjd.grammar import ImageGrammar
from sjd.window import Draw, Window

Choice = tuple[Tensor, Tensor]
"""Uniform numbers (rows, outcomes) that stand for the outcomes of one choice, and their probabilities."""


class Table:
    """p(x_i | x_0 .. x_(i-1)) for every prefix, float64, drawn from a generator; some tokens are impossible."""

    def __init__(self, vocab: int, length: int, generator: torch.Generator, zeros: bool = True) -> None:
        self.vocab, self.length = vocab, length
        self.tables = []
        for position in range(length):
            table = torch.rand(vocab**position, vocab, generator=generator, dtype=torch.float64) ** 2 + 0.02
            if zeros and vocab > 2:
                table[torch.rand(len(table), generator=generator) < 0.3, 0] = 0
            self.tables.append(table / table.sum(-1, keepdim=True))

    def probs(self, known: Tensor, positions: Tensor) -> Tensor:
        """Distributions (rows, width, vocab) at these positions, the tokens in front taken from `known`."""
        out = torch.full((*positions.shape, self.vocab), 1 / self.vocab, dtype=torch.float64)
        powers = self.vocab ** torch.arange(self.length)
        codes = torch.cat((torch.zeros(len(known), 1).long(), (known[:, : self.length] * powers).cumsum(1)), 1)
        for position, table in enumerate(self.tables):
            row, place = (positions == position).nonzero(as_tuple=True)
            out[row, place] = table[codes[row, position]]
        return out

    def law(self) -> Tensor:
        """Probability of each of the vocab ** length sequences, in the order of `code`."""
        sequences = torch.tensor(list(itertools.product(range(self.vocab), repeat=self.length)))
        positions = torch.arange(self.length).expand(len(sequences), -1)
        chosen = self.probs(sequences, positions).gather(-1, sequences[..., None]).squeeze(-1)
        law = torch.zeros(len(sequences), dtype=torch.float64)
        law[self.code(sequences)] = chosen.prod(1)
        return law

    def code(self, sequences: Tensor) -> Tensor:
        """The number (rows,) of each sequence in a law."""
        return (sequences[:, : self.length] * self.vocab ** torch.arange(self.length)).sum(1)


def make_window(
    table: Any,
    rows: int,
    config: SJDConfig,
    draw: Draw,
    *,
    grammar: ImageGrammar | None = None,
    kind: Callable[..., Window] = Window,
) -> Window:
    """A window over a table, or anything with its `vocab` and `length`; `kind` is its class."""
    grammar = ImageGrammar.free(table.length, slice(0, table.vocab)) if grammar is None else grammar
    assert isinstance(config.window, int)
    return kind(rows, config.window, table.vocab, grammar, config, do_sample=True, draw=draw)


def sample(
    table: Table,
    rows: int,
    config: SJDConfig,
    generator: torch.Generator,
    *,
    grammar: ImageGrammar | None = None,
    kind: Callable[..., Window] = Window,
) -> Tensor:
    """Sequences (rows, length) of one batch, whose rows accept different numbers."""
    window = make_window(
        table,
        rows,
        config,
        lambda shape: torch.rand(shape, generator=generator, dtype=torch.float64),
        grammar=grammar,
        kind=kind,
    )
    for _ in range(table.length):
        window.advance(table.probs(window.known, window.positions()).to(window.dtype))
    return window.known[:, : table.length]


def enumerated_law(
    table: Table,
    config: SJDConfig,
    noises: tuple[Tensor, Tensor] | None = None,
    *,
    grammar: ImageGrammar | None = None,
    kind: Callable[..., Window] = Window,
) -> Tensor:
    """The law (vocab ** length,) of the output, by following every choice through `Window` with its probability.

    `noises`: noise (cases, length, vocab) and the weights (cases,) of the cases, for modes that draw noise.
    """
    script: list[Tensor] = []
    cases = 1 if noises is None else len(noises[1])

    def draw(shape: tuple[int, ...]) -> Tensor:
        return script.pop(0).reshape(shape)

    window = make_window(table, cases, config, draw, grammar=grammar, kind=kind)
    if noises is not None:
        padded = torch.cat((noises[0], noises[0].new_zeros(cases, 2 * window.size + 2, table.vocab)), 1)
        window._gumbel = lambda positions: padded[window.row[:, None], positions]  # type: ignore[method-assign]
    weights = torch.ones(1, dtype=torch.float64) if noises is None else noises[1].clone()
    for _ in range(table.length):
        target = table.probs(window.known, window.positions())
        groups = (_tests(window, target), _draws(window, target), _guesses(window, len(target)))
        choices = [choice for group in groups for choice in group]
        numbers = [torch.arange(values.shape[1]) for values, _ in choices]
        index = torch.cartesian_prod(*numbers).reshape(-1, len(choices))
        picked = [(values[:, i], chance[:, i]) for (values, chance), i in zip(choices, index.T, strict=True)]
        product = torch.stack([chance for _, chance in picked]).prod(0) * weights[:, None]
        uniforms = torch.stack([values for values, _ in picked], -1)  # (rows, outcomes, choices)
        keep = (product > 0).nonzero(as_tuple=True)
        window.select(keep[0])
        weights = product[keep]
        parts = uniforms[keep].split([len(group) for group in groups], -1)
        script[:] = [part for part in parts if part.shape[-1] or window.verify == "speculative"]
        window.advance(target[keep[0]])
        weights = _merged(window, weights, table.length, noises is not None)
    law = torch.zeros(table.vocab**table.length, dtype=torch.float64)
    return law.index_add_(0, table.code(window.known), weights)


def binary_noises(table: Table) -> tuple[Tensor, Tensor]:
    """For two tokens: noise from every cell in which no context changes its token, and the probability of the cell."""
    cells = []
    for position in range(table.length):
        edges = torch.cat((table.tables[position][:, 1], torch.tensor([0.0, 1.0], dtype=torch.float64))).sort().values
        middle = (edges[1:] + edges[:-1]) / 2
        # g_0 - g_1 is logistic: with u its quantile, token 1 is taken where p(1) > u.
        cells.append((torch.stack(((middle / (1 - middle)).log(), torch.zeros_like(middle)), -1), edges.diff()))
    index = torch.cartesian_prod(*(torch.arange(len(weight)) for _, weight in cells)).reshape(-1, table.length)
    noise = torch.stack([values[i] for (values, _), i in zip(cells, index.T, strict=True)], 1)
    weights = torch.stack([weight[i] for (_, weight), i in zip(cells, index.T, strict=True)]).prod(0)
    return noise, weights


def _tests(window: Window, target: Tensor) -> list[Choice]:
    """For every draft: a uniform number that accepts and one that rejects."""
    if window.verify == "match" or window.laws is None:
        return []
    drafts = window.known.gather(1, window.positions()[:, :-1]).clamp(max=window.columns - 1)
    choices = []
    for place in range(target.shape[1] - 1):
        p, q = (law[:, place].gather(-1, drafts[:, place, None]) for law in (target, window.laws))
        ratio = torch.where(q > 0, (p / q).clamp(max=1), 1.0)
        choices.append((torch.cat((ratio * 0.5, 0.5 * (1 + ratio)), 1), torch.cat((ratio, 1 - ratio), 1)))
    return choices


def _draws(window: Window, target: Tensor) -> list[Choice]:
    """For every position: a number from each interval on which neither p nor the residual changes its token."""
    if window.verify == "match":
        return []
    choices = []
    for place in range(target.shape[1]):
        edges = [target[:, place].cumsum(-1)]
        if window.laws is not None and place < window.laws.shape[1]:
            edges.append(residual_probs(target[:, place], window.laws[:, place]).cumsum(-1))
        every = torch.cat(edges, -1).clamp(0, 1).sort(-1).values
        every = torch.cat((torch.zeros_like(every[:, :1]), every), 1)
        choices.append(((every[:, 1:] + every[:, :-1]) / 2, every.diff(dim=1)))
    return choices


def _guesses(window: Window, rows: int) -> list[Choice]:
    """For every first guess: a number for each token, where the scheme draws one."""
    count = window.columns if window.scheme in ("random", "uniform") else 1
    values = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return [(values.expand(rows, -1), torch.full((rows, count), 1 / count, dtype=torch.float64))] * window.size


def _merged(window: Window, weights: Tensor, length: int, by_row: bool) -> Tensor:
    """Keep one of each set of equal states, and return the sums of their weights."""
    behind = torch.arange(window.known.shape[1]) >= torch.minimum(window.committed + window.size, window.ends)[:, None]
    window.known.masked_fill_(behind, 0)
    parts = [window.known.double(), window.committed[:, None].double()]
    if window.laws is not None:
        laws = window.laws.clone()
        laws[window.committed[:, None] + torch.arange(window.size) >= length] = 0
        parts.append((laws.flatten(1) * 1e11).round())
    if by_row:
        parts.append(window.row[:, None].double())
    _, index = torch.unique(torch.cat(parts, 1), dim=0, return_inverse=True)
    first = torch.full((int(index.max()) + 1,), len(index)).scatter_reduce_(0, index, torch.arange(len(index)), "amin")
    merged = torch.zeros(len(first), dtype=torch.float64).index_add_(0, index, weights)
    window.select(first)
    return merged


class KeepsOldLaws(Window):
    """The bookkeeping of published code, as a control that must fail: an accepted leftover keeps its old law."""

    def advance(self, target: Tensor) -> Tensor:
        """As `Window.advance`, then the old q for every draft that did not change."""
        old, width = self.laws, self.width
        before = self.known.gather(1, self.positions()[:, :-1])
        counts = super().advance(target)
        if old is None or self.laws is None:
            return counts
        source = counts[:, None] + torch.arange(self.size)
        inside, source = source < width - 1, source.clamp(max=width - 2)
        now = self.known.gather(1, self.positions()[:, :-1])
        kept = inside & (now == before.gather(1, source))
        old = old.gather(1, source[..., None].expand(-1, -1, self.columns))
        self.laws = torch.where(kept[..., None], old, self.laws)
        return counts


@dataclass(frozen=True)
class Deviation:
    """One mode on one toy: the total variation between the law of its output and that of plain sampling."""

    mode: str
    vocab: int
    length: int
    window: int
    total_variation: float
    exact: bool


def deviations(seed: int = 0) -> Iterator[Deviation]:
    """Enumerate every mode on a few random tables, and the control."""
    generator = torch.Generator().manual_seed(seed)
    for vocab, length, window in ((2, 4, 2), (3, 3, 2), (2, 4, 3)):
        table = Table(vocab, length, generator)
        square = ImageGrammar([(2, 2)], slice(0, vocab)) if length == 4 else None
        for refresh in ("independent", "maximal"):
            for init in ("random", "uniform", "left", "above", "auto"):
                if (init == "above" and square is None) or (init in ("random", "uniform") and window > 2):
                    continue
                config = _config(window, refresh, init)
                yield _deviation(f"{refresh}, {init}", table, config, grammar=square if init == "above" else None)
        control = _config(window, "maximal", "left")
        yield _deviation("control: accepted drafts keep their old q", table, control, kind=KeepsOldLaws, exact=False)
    table = Table(2, 3, generator)
    for verify in ("speculative", "match"):
        config = _config(2, "gumbel", "left", verify)
        yield _deviation(f"gumbel, left, {verify}", table, config, noises=binary_noises(table))


def _config(window: int, refresh: Any, init: Any, verify: Any = "speculative") -> SJDConfig:
    return SJDConfig(window=window, refresh=refresh, init=init, verify=verify, prob_dtype="float64")


def _deviation(mode: str, table: Table, config: SJDConfig, exact: bool = True, **options: Any) -> Deviation:
    law = enumerated_law(table, config, **options)
    assert isinstance(config.window, int)
    distance = float((law - table.law()).abs().sum() / 2)
    return Deviation(mode, table.vocab, table.length, config.window, distance, exact)
