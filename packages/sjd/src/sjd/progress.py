"""What callbacks and streamers are told after every pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sjd.engine import Engine


@dataclass(frozen=True)
class Progress:
    """The state behind a pass: `tokens` (B, length) int64, guesses included; the first `committed[b]` are final."""

    passes: int
    tokens: Tensor
    committed: tuple[int, ...]
    done: bool
    _engine: Engine

    def images(self) -> Tensor:
        """The pictures (B, 3, height, width) in 0..1 as they stand; cells not guessed yet show the first image token.

        Raises `UnsupportedModelError` for models without a decoder.
        """
        grammar = self._engine.request.grammar
        first = grammar.allowed.start if isinstance(grammar.allowed, slice) else 0
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        ends = torch.tensor(self.committed, device=self.tokens.device)[:, None] + self._engine.size
        return self._engine.adapter.decode_image(torch.where(place < ends, self.tokens, first), grammar)


ProgressCallback = Callable[[Progress], Any]


def reporter(callback: ProgressCallback | None, streamer: Any) -> Callable[[Engine], None] | None:
    """What an engine calls after a pass, or None when nobody listens; `streamer` takes the tokens of one row."""
    if callback is None and streamer is None:
        return None
    streamed = 0

    def on_pass(engine: Engine) -> None:
        nonlocal streamed
        tokens, committed = engine.current()
        done = all(engine.done)
        if streamer is not None:
            if committed[0] > streamed:
                streamer.put(tokens[0, streamed : committed[0]].cpu())
                streamed = committed[0]
            if done:
                streamer.end()
        if callback is not None:
            callback(Progress(engine.passes, tokens.clone(), tuple(committed), done, engine))

    return on_pass
