"""The loop: a forward pass over the window, then what `Window` makes of it, until every row has ended."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pared_hooks import ConfigError
from pared_kernels.dispatch import has_triton
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from sjd.adapters.base import Adapter, Prompt
from sjd.cache import RaggedCache
from sjd.config import SJDConfig
from sjd.functional.processing import guide, masked
from sjd.grammar import ImageGrammar
from sjd.kernel_window import KernelWindow
from sjd.memory import warn_if_large
from sjd.processing import Processing
from sjd.readback import Readback
from sjd.stats import ImageStats, Run
from sjd.window import Window


@dataclass
class Request:
    """All that one generation needs, in tensors; `decode` and its siblings make it from what a caller passed.

    `prompts`: the conditional rows, and the unconditional ones of a guided request. `prompt_ids` (B, P) is what
    processors and stopping criteria see in front of the generated tokens.
    """

    prompts: list[Prompt]
    grammar: ImageGrammar
    processing: Processing
    do_sample: bool
    prompt_ids: Tensor
    eos: list[int] = field(default_factory=list)
    criteria: Sequence[Any] = ()
    generator: torch.Generator | None = None
    on_pass: Callable[[Engine], None] | None = None


class Side:
    """Rows that run in one forward pass: conditional, unconditional, or both."""

    def __init__(
        self, adapter: Adapter, prompt: Prompt, length: int, size: int, copies: int, dynamic: bool, static: bool
    ) -> None:
        self.adapter, self.prompt, self.copies, self.dynamic = adapter, prompt, copies, dynamic
        self.tokens = prompt.embeds.shape[1]
        # The last slot that may hold a token of the answer; what a window holds behind it is cut off.
        self.last_slot = self.tokens + length - 1
        # A dynamic cache is masked row by row, too: then a ragged one without layers keeps the lengths.
        self.rows = RaggedCache(
            0 if dynamic else adapter.layers(), len(prompt.embeds), self.last_slot + 1 + size, prompt.embeds.device,
            static=static,
        )  # fmt: skip
        self.cache: Cache = DynamicCache() if dynamic else self.rows

    def read_prompt(self, columns: slice | None) -> Tensor:
        """Logits (R, 1, V) behind the prompt."""
        self.rows.show(self.tokens, exactly=self.dynamic)
        return self._forward(self.prompt.embeds, columns, self.adapter.logits, last=True)

    def read(
        self,
        embeds: Tensor,
        committed: Tensor,
        visible: int | None,
        columns: slice | None,
        logits: Callable[..., Tensor],
        equal: int | None = None,
    ) -> Tensor:
        """Logits (R, K, V) of a window (B, K, D) that begins with the last of `committed` (B,) generated tokens.

        `visible`: how many behind the prompt are looked at, None for all slots; `equal`: what all of `committed` are,
        where that is known.
        """
        self.crop(committed, equal)
        if self.dynamic:
            self.rows.show(int(self.rows.lengths[0]) + embeds.shape[1], exactly=True)
        else:
            self.rows.show(self.rows.slots if visible is None else self.tokens + visible)
        found = self._forward(embeds.repeat(self.copies, 1, 1), columns, logits)
        # A CUDA graph writes the next pass over the result of this one.
        return found.clone() if visible is None else found

    def crop(self, committed: Tensor, equal: int | None = None) -> None:
        """Forget everything but the prompt and `committed` (B,) tokens, the last of which was not read yet."""
        lengths = (committed + (self.tokens - 1)).repeat(self.copies)
        self.rows.place(lengths, None if equal is None else self.tokens - 1 + equal)
        if self.dynamic and (held := self.cache.get_seq_length()):
            self.cache.crop(min(int(self.rows.lengths[0]) - held, 0))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        layers = self.cache.layers
        return sum(one.nbytes for layer in layers for one in (layer.keys, layer.values) if one is not None)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of each copy."""
        total = len(self.prompt.padding) // self.copies
        every = torch.cat([rows + copy * total for copy in range(self.copies)])
        table = self.prompt.table
        self.prompt = Prompt(
            self.prompt.embeds[every], self.prompt.padding[every], None if table is None else table[:, every]
        )
        self.rows.select(every)

    def _forward(
        self, embeds: Tensor, columns: slice | None, logits: Callable[..., Tensor], last: bool = False
    ) -> Tensor:
        mask = self.rows.mask(embeds.shape[1], self.prompt.padding, embeds.dtype)
        slots = self.rows.next_slots(embeds.shape[1]).clamp(max=self.last_slot)
        return logits(embeds, mask, self.adapter.positions(slots, self.prompt), self.cache, columns, last)


class Engine:
    """One generation. `run` returns the tokens (B, length) int64 and where each row ends (B,).

    `size` drafts a pass; 0 is plain decoding. `logits` is the compiled form of `adapter.logits`, whose shapes must not
    change. `kernels` and `kind`, the class of the window, are chosen here unless given.
    """

    def __init__(
        self,
        adapter: Adapter,
        request: Request,
        config: SJDConfig,
        size: int,
        *,
        logits: Callable[..., Tensor] | None = None,
        kernels: bool | None = None,
        kind: Callable[..., Window] | None = None,
    ) -> None:
        self.adapter, self.request, self.config, self.size = adapter, request, config, size
        self.logits = adapter.logits if logits is None else logits
        self.static = logits is not None
        self.columns = self._columns()
        grammar = request.grammar
        first = request.prompts[0]
        self.device = first.embeds.device
        self.rows = len(first.embeds)
        guided = len(request.prompts) > 1
        joint = guided and config.guidance_batch == "joint"
        prompts = [Prompt.joined(request.prompts)] if joint else request.prompts
        self.sides = [
            Side(adapter, prompt, grammar.length, size, 2 if joint else 1, config.cache == "dynamic", self.static)
            for prompt in prompts
        ]
        vocabulary = adapter.vocabulary
        offset = 0 if self.columns is None else self.columns.start
        width = vocabulary if self.columns is None else self.columns.stop - self.columns.start
        neighbours = None
        if config.relax:
            neighbours = nearest_entries(adapter.codebook(), width).to(self.device)
        self.kernels = self._use_kernels() if kernels is None else kernels
        if kind is None:
            kind = functools.partial(KernelWindow, processing=request.processing) if self.kernels else Window
        self.window = kind(
            self.rows,
            size,
            width,
            grammar,
            config,
            do_sample=request.do_sample,
            draw=self._draw,
            offset=offset,
            eos=torch.tensor(request.eos, device=self.device) if request.eos and not grammar.has_grid else None,
            seed=self._seed(),
            neighbours=neighbours,
            device=self.device,
        )
        warn_if_large(self.rows, size, width, self.window.dtype, self.device)
        self.passes = 0
        self.alive = list(range(self.rows))  # the row of the request that each row of the window is
        self.images = [ImageStats(window=size) for _ in range(self.rows)]
        self.tokens = torch.zeros(self.rows, grammar.length, dtype=torch.int64, device=self.device)
        self.lengths = [0] * self.rows
        self.done = [grammar.length == 0] * self.rows
        self.seconds = 0.0

    @torch.no_grad()
    def run(self) -> tuple[Tensor, Tensor]:
        """Generate. Raises RuntimeError naming row and position where the model's logits are not finite."""
        start = time.perf_counter()
        # What is done with the tokens of a pass before the next one must not come late.
        late = self.device.type == "cuda" and not self._watched()
        readback = Readback(late)
        try:
            while not all(self.done[row] for row in self.alive):
                counts = readback.push(self._advance())
                if counts is not None:
                    self._take(counts)
                if self._may_compact():
                    # What is still on its way belongs to the rows as they are.
                    if (counts := readback.rest()) is not None:
                        self._take(counts)
                    self._compact()
            if (counts := readback.rest()) is not None:
                self._take(counts)
            self._keep(list(range(len(self.alive))))
        finally:
            for side in self.sides:
                side.crop(self.window.committed)
            self.seconds = time.perf_counter() - start
        return self.tokens, torch.tensor(self.lengths, device=self.device)

    def report(self) -> Run:
        """What this generation did."""
        unchanged, behind = self.window.survived.tolist()
        bound, bounded = self.window.relaxed.tolist()
        window = self.window
        sampled = "greedy" if not self.request.do_sample else f"{window.verify}, {window.refresh}"
        return Run(
            self.images,
            sampled,
            self.size,
            self.seconds,
            self.passes,
            (unchanged, behind),
            (bound, bounded),
            window.peak_bytes,
            sum(side.nbytes for side in self.sides),
        )

    def _advance(self) -> Tensor:
        """One pass; what it committed (B,), as `Window.advance` returns it."""
        return self._decide(*self._read())

    def _read(self) -> tuple[Tensor, Tensor | None]:
        """Logits (B, K, columns) of the window's positions, and those of the unconditional rows of a guided request."""
        if self.passes == 0:
            parts = [side.read_prompt(self.columns) for side in self.sides]
        else:
            window = self.window
            embeds = self.adapter.embed(window.inputs(), "image")
            visible = None if self.static else self._visible()
            equal = self._equal()
            parts = [
                side.read(embeds, window.committed, visible, self.columns, self.logits, equal) for side in self.sides
            ]
        logits = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self.device)
        self.passes += 1
        rows = len(self.window.known)
        return logits[:rows], logits[rows:] if len(logits) > rows else None

    def _decide(self, conditional: Tensor, unconditional: Tensor | None) -> Tensor:
        window = self.window
        allowed = self.request.grammar.allowed if self.columns is None else None
        forced = window.forced()
        if self.kernels:
            return window.advance(self._guided(conditional, unconditional, allowed))
        target = self.request.processing.target(
            conditional.to(window.dtype),
            None if unconditional is None else unconditional.to(window.dtype),
            allowed,
            None if forced is None else torch.where(forced >= 0, 0, -1),
            self._prefix if self.request.processing.by_prefix else None,
            greedy=not self.request.do_sample,
        )
        return window.advance(target)

    def _guided(self, conditional: Tensor, unconditional: Tensor | None, allowed: slice | Tensor | None) -> Tensor:
        """Logits (B, K, V) as the kernels read them: of the model's dtype where nothing is done to them."""
        if self.window.dtype == torch.float64:
            conditional = conditional.double()
        if unconditional is not None and self.request.processing.guidance is not None:
            wide = self.window.dtype
            conditional = guide(conditional.to(wide), unconditional.to(wide), self.request.processing.guidance.scale)
        return conditional if allowed is None else masked(conditional, allowed)

    def _use_kernels(self) -> bool:
        """Whether the kernels run this request. Raises `ConfigError` where they were asked for and cannot."""
        if self.config.backend == "torch" or not self.request.do_sample:
            return False
        allowed = self.request.grammar.allowed
        whole = self.columns is not None or allowed is None or allowed == slice(0, self.adapter.vocabulary)
        reason = KernelWindow.why_not(self.config, self.request.processing, whole)
        if reason is not None and self.config.backend == "triton":
            raise ConfigError(f"SJDConfig.backend = 'triton' is not valid here: {reason}", "backend")
        on_gpu = self.device.type == "cuda" and has_triton()
        return reason is None and (on_gpu or self.config.backend == "triton")

    def _take(self, counts: list[int]) -> None:
        """Book what a pass committed, by row of the window."""
        for place, count in enumerate(counts):
            row = self.alive[place]
            if count < 0:
                position = self.lengths[row] - 1 - count
                raise RuntimeError(
                    f"the logits of row {row} at position {position} of the answer are not finite, or no token is "
                    "possible there"
                )
            if self.done[row]:
                continue
            count = self._stopped(place, count)
            self.images[row].committed.append(count)
            self.lengths[row] += count
        ends = self.window.ends.tolist() if self.window.eos is not None or self.request.criteria else None
        for place, row in enumerate(self.alive):
            end = self.request.grammar.length if ends is None else ends[place]
            self.done[row] = self.lengths[row] >= end
        if self.request.on_pass is not None:
            self.request.on_pass(self)

    def _stopped(self, place: int, count: int) -> int:
        """How many of the `count` new tokens are kept: up to the one with which a stopping criterion holds."""
        row = self.alive[place]
        for taken in range(1, count + 1) if self.request.criteria else ():
            ids = torch.cat((self.request.prompt_ids[row], self.window.known[place, : self.lengths[row] + taken]))
            if any(bool(one(ids[None], None).any()) for one in self.request.criteria):
                ends = self.window.ends.clone()
                ends[place] = self.lengths[row] + taken
                self.window.finish(ends)
                return taken
        return count

    def _keep(self, places: list[int]) -> None:
        """Copy the tokens of these rows of the window to the result."""
        length = self.tokens.shape[1]
        rows = [self.alive[place] for place in places]
        self.tokens[rows] = self.window.known[places, :length]

    def _may_compact(self) -> bool:
        """Whether fewer than half of the rows go on, and nothing counts on their number."""
        living = sum(not self.done[row] for row in self.alive)
        fixed = self.static or self.request.processing.by_prefix or self.config.cache == "dynamic"
        return 0 < 2 * living < len(self.alive) and not fixed

    def _compact(self) -> None:
        living = [place for place, row in enumerate(self.alive) if not self.done[row]]
        if not living:
            return
        self._keep([place for place in range(len(self.alive)) if place not in living])
        self.alive = [self.alive[place] for place in living]
        rows = torch.tensor(living, device=self.device)
        self.window.select(rows)
        for side in self.sides:
            side.select(rows)

    def current(self) -> tuple[Tensor, list[int]]:
        """Tokens (B, length) as they stand, drafts included, and how many of each row are final."""
        self._keep(list(range(len(self.alive))))
        return self.tokens, list(self.lengths)

    def _equal(self) -> int | None:
        """How many tokens every row has committed, where all have as many and the host is up to date."""
        first = self.lengths[self.alive[0]]
        known = self.device.type == "cpu" and not self.static and self.passes > 0
        return first if known and all(self.lengths[row] == first for row in self.alive) else None

    def _visible(self) -> int:
        """Slots behind the prompt that this pass may reach, from what the host knows."""
        longest = max(self.lengths[row] for row in self.alive)
        # The counts of one pass may still be on their way.
        return longest + (2 if self.device.type == "cuda" else 1) * (self.size + 1)

    def _prefix(self, place: int) -> list[tuple[Tensor, list[int]]]:
        """The tokens in front of a place of the window, for the rows of each length."""
        committed = self.window.committed.tolist()
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(committed):
            if not self.done[self.alive[row]]:
                groups.setdefault(length, []).append(row)
        prompt = self.request.prompt_ids
        return [
            (torch.cat((prompt, self.window.known[:, : length + place]), 1), rows) for length, rows in groups.items()
        ]  # fmt: skip

    def _watched(self) -> bool:
        request = self.request
        return bool(request.criteria) or request.on_pass is not None or request.processing.by_prefix

    def _columns(self) -> slice | None:
        """The columns of the head that are computed: all (None), or the image tokens."""
        allowed = self.request.grammar.allowed
        if not isinstance(allowed, slice) or self.config.vocab_slice == "off" or self.request.processing.by_id:
            return None
        return None if allowed.start == 0 and allowed.stop >= self.adapter.vocabulary else allowed

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        generator = self.request.generator
        place = self.device if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=place, dtype=torch.float64).to(self.device)

    def _seed(self) -> int:
        if self.config.seed is not None:
            return self.config.seed
        generator = self.request.generator
        place = "cpu" if generator is None else generator.device
        return int(torch.randint(2**62, (), generator=generator, device=place))


def nearest_entries(codebook: Tensor, columns: int, count: int = 64) -> Tensor:
    """For each entry of a codebook (V, channels) the columns (columns, count) of its nearest ones, itself left out."""
    book = codebook.detach().float()[:columns]
    distances = torch.cdist(book, book)
    distances.fill_diagonal_(torch.inf)
    return distances.topk(min(count, len(book) - 1), largest=False).indices
