"""`Window`: the drafts of a batch of rows, the laws they were drawn from, and what one pass makes of them.

No model and no cache is known here. What makes the output law exact, and each way to lose it, is in this file and in
`functional.acceptance`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pared_kernels import philox
from torch import Tensor

from sjd.config import SJDConfig
from sjd.functional.acceptance import window_step
from sjd.functional.drafts import SAMPLED, drafts_from, uniform_law
from sjd.grammar import ImageGrammar

Draw = Callable[[tuple[int, ...]], Tensor]
"""Uniform float64 numbers in [0, 1) of this shape."""


class Window:
    """State of `rows` rows that generate up to `grammar.length` tokens each, `size` drafts at a time.

    Positions count generated tokens from 0. Columns are the tokens that logits are computed for: column v is token
    `offset` + v. A forced position has the column 0 for certain, in p as in q, whatever its token.

    Attributes:
        known: (rows, positions) int64 tokens: final ones below `committed`, then drafts.
        committed: (rows,) int64 final tokens of each row; ends: (rows,) int64 where each row ends.
        laws: (rows, size, columns) q of the drafts, or None where drafts are compared and not tested.
    """

    def __init__(
        self,
        rows: int,
        size: int,
        columns: int,
        grammar: ImageGrammar,
        config: SJDConfig,
        *,
        do_sample: bool,
        draw: Draw,
        offset: int = 0,
        eos: Tensor | None = None,
        seed: int = 0,
        neighbours: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size, self.columns, self.offset = size, columns, offset
        self.grammar = grammar.to(device)
        self.draw, self.eos, self.seed = draw, eos, seed
        self.refresh, self.margin = config.refresh, config.stop_margin
        self.scheme = config.init
        if self.scheme in SAMPLED and not do_sample:
            # There are scores and no distributions: what a neighbour is drawn from is certain, and drawing is copying.
            self.scheme = "left" if self.scheme == "left_sample" else "above"
        # Greedy decoding compares: a random test would not be greedy.
        self.verify = config.verify if do_sample else "match"
        self.noise = do_sample and (self.verify == "match" or self.refresh == "gumbel")
        self.dtype = torch.float64 if config.prob_dtype == "float64" else torch.float32
        self.flat = uniform_law(self.grammar.allowed, torch.empty(columns, dtype=self.dtype, device=device), offset)
        self.relax, self.neighbours = config.relax, neighbours
        self.known = torch.zeros(rows, grammar.length + 2 * size + 2, dtype=torch.int64, device=device)
        self.committed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ends = torch.full_like(self.committed, grammar.length)
        self.row = torch.arange(rows, device=device)
        self.stream = 0
        self.laws: Tensor | None = None
        self.width = 1  # positions of the pass that comes next: the first one has no drafts
        self.history = self._ring() if self.scheme in SAMPLED else None
        self.survived = torch.zeros(2, dtype=torch.int64, device=device)  # drafts behind the commit: unchanged, all
        self.relaxed = torch.zeros(2, dtype=torch.float64, device=device)  # bound of the deviation: sum, positions
        self.peak_bytes = 0

    @property
    def device(self) -> torch.device:
        """Where the state is."""
        return self.known.device

    def positions(self) -> Tensor:
        """Positions (rows, width) that the next pass gives a distribution for."""
        return self.committed[:, None] + torch.arange(self.width, device=self.device)

    def inputs(self) -> Tensor:
        """Tokens (rows, width) the next pass reads: the last final one, then the drafts."""
        return self.known.gather(1, self.positions() - 1)

    def forced(self) -> Tensor | None:
        """Forced tokens (rows, width) of the next pass' positions, -1 where there is a choice; None for none at all."""
        return self.grammar.forced(self.positions()) if self.grammar.has_forced else None

    def advance(self, target: Tensor) -> Tensor:
        """Take p (rows, width, columns) of the pass, commit, refresh and refill; return what was committed (rows,).

        For greedy decoding `target` may be any scores of the same order. A row in which the distribution of a position
        that was to be committed is not finite commits nothing, and returns -1 - that position's place in the window.
        """
        positions, forced = self.positions(), self.forced()
        drafts = self.known.gather(1, positions[:, :-1])
        columns = drafts - self.offset
        if forced is not None:
            columns = torch.where(forced[:, :-1] >= 0, 0, columns)
        tokens, counts, target = self._step(columns, target, positions)
        limit = self.ends - self.committed
        bad = ~target.gather(-1, tokens[..., None]).squeeze(-1).isfinite()
        tokens = tokens + self.offset
        if forced is not None:
            tokens = torch.where(forced >= 0, forced, tokens)
        if self.eos is not None:
            counts = self._stop(tokens, counts)
        place = torch.arange(self.width, device=self.device)
        bad &= place < counts[:, None]
        failed = bad.any(1)
        counts = counts.masked_fill(failed, 0)
        behind = (place[:-1] >= counts[:, None]) & (place[:-1] < limit[:, None])
        same = behind & (tokens[:, :-1] == drafts)
        self.survived += torch.stack((same.sum(), behind.sum()))
        self.known.scatter_(1, positions, tokens)
        self._remember(positions, target)
        self._refill(target, counts)
        self.committed = self.committed + counts
        return torch.where(failed, -1 - bad.long().argmax(1), counts)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        for name in ("known", "committed", "ends", "row", "laws", "history"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[rows])

    def finish(self, ends: Tensor) -> None:
        """Lower the end of rows (rows,), such as where a stopping criterion held; what is behind is not committed."""
        self.ends = torch.minimum(self.ends, ends)
        self.committed = torch.minimum(self.committed, self.ends)

    def _step(self, columns: Tensor, target: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Columns (rows, width) that stand now, committed lengths, and the distributions (or scores) behind them."""
        limit = self.ends - self.committed
        valid = positions[:, :-1] < (self.ends - self.margin)[:, None]
        laws = self.laws
        if self.width == 1 and self.verify == "speculative":
            laws = target[:, :0]
        self.peak_bytes = max(self.peak_bytes, target.nbytes + (0 if laws is None else laws.nbytes))
        step = window_step(
            columns,
            laws,
            target,
            *self._uniforms(len(columns)),
            refresh=self.refresh,
            verify=self.verify,
            gumbel=self._gumbel(positions) if self.noise else None,
            valid=valid,
            limit=limit,
            added=self._added(columns, target),
        )
        return step.tokens, step.committed, target

    def _uniforms(self, rows: int) -> tuple[Tensor, Tensor]:
        """For the tests and for what is drawn; none where drafts are compared."""
        if self.verify == "match":
            nothing = torch.empty(rows, 0, device=self.device)
            return nothing, nothing
        return self.draw((rows, self.width - 1)), self.draw((rows, self.width))

    def _gumbel(self, positions: Tensor) -> Tensor:
        return philox.gumbel(self.seed, self.row, positions, self.columns, self.stream, self.dtype, self.offset)

    def _stop(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Cut what is committed behind the first end token, and end those rows."""
        place = torch.arange(self.width, device=self.device)
        assert self.eos is not None
        is_end = torch.isin(tokens, self.eos) & (place < counts[:, None])
        found = is_end.any(1)
        counts = torch.where(found, is_end.long().argmax(1) + 1, counts)
        self.ends = torch.where(found, self.committed + counts, self.ends)
        return counts

    def _refill(self, target: Tensor, counts: Tensor) -> None:
        """Shift what was not committed to the front, with the newest p as its law, and append first guesses."""
        if not self.size:
            return
        first = self.committed + self.width
        fill, law = drafts_from(
            self.draw((len(counts), self.size)), self.known, first, self.grammar, scheme=self.scheme,
            vocab=self.offset + self.columns, neighbour_probs=self._recall, offset=self.offset,
        )  # fmt: skip
        place = torch.arange(self.size, device=self.device)
        self.known.scatter_(1, first[:, None] + place, fill)
        left, self.width = self.width, self.size + 1
        if self.verify == "match":
            return
        index = place - (left - counts)[:, None]  # of each window place among the new drafts, negative for old ones
        forced = self.grammar.forced(first[:, None] + place)
        column = torch.where(forced >= 0, 0, fill - self.offset)
        self._keep_laws(target, counts, index, column, forced >= 0, law)

    def _keep_laws(
        self, target: Tensor, counts: Tensor, index: Tensor, fill: Tensor, forced: Tensor, law: str | Tensor
    ) -> None:
        """Set the laws of the next drafts: p of this pass for those that stay, and of new ones what they come from.

        `index` (rows, size) of each place among the new drafts, negative for one that stays; `fill` (rows, size) the
        columns of the new drafts, `forced` whether they are certain, `law` what the others were drawn from.
        """
        self.laws = None  # before the new one is made: two of them are never held beside p
        place = torch.arange(self.size, device=self.device)
        source = (counts[:, None] + place).clamp(max=target.shape[1] - 1)
        laws = target.gather(1, source[..., None].expand(-1, -1, self.columns))
        new, index = (index >= 0)[..., None], index.clamp(min=0)
        first = torch.zeros_like(laws).scatter_(-1, fill.gather(1, index)[..., None], 1.0)
        if isinstance(law, Tensor) or law != "onehot":
            drawn = self.flat if isinstance(law, str) else self._moved(law, index)
            first = torch.where(forced.gather(1, index)[..., None], first, drawn)
        self.laws = torch.where(new, first, laws)

    def _moved(self, law: Tensor, index: Tensor) -> Tensor:
        return law.gather(1, index[..., None].expand(-1, -1, self.columns))

    def _ring(self) -> Tensor:
        """The last distributions of as many positions as a neighbour can be away."""
        stride = max((width for _, width in self.grammar.grids), default=1) + 1
        return torch.zeros(
            len(self.known), stride + 2 * self.size + 2, self.columns, dtype=self.dtype, device=self.device
        )

    def _remember(self, positions: Tensor, target: Tensor) -> None:
        if self.history is not None:
            slot = (positions % self.history.shape[1])[..., None].expand_as(target)
            self.history.scatter_(1, slot, target.to(self.history.dtype))

    def _recall(self, source: Tensor) -> Tensor:
        assert self.history is not None
        slot = source.clamp(min=0) % self.history.shape[1]
        return self.history.gather(1, slot[..., None].expand(-1, -1, self.columns))

    def _added(self, columns: Tensor, target: Tensor) -> Tensor | None:
        """Mass of the codebook neighbours of each draft that together stay within `relax`; see `SJDConfig.relax`."""
        if not self.relax or self.verify == "match" or self.width == 1:
            return None
        assert self.neighbours is not None
        near = target[:, :-1].gather(-1, self.neighbours[columns])
        total = near.cumsum(-1)
        assert self.laws is not None
        # The tokens whose share grows take no more than `relax` each, and no more than q has above p.
        bound = (self.laws - target[:, :-1]).clamp(0, self.relax).sum(-1)
        self.relaxed += torch.stack((bound.sum().double(), torch.tensor(bound.numel(), device=self.device).double()))
        return torch.where(total <= self.relax, near, 0).sum(-1)
