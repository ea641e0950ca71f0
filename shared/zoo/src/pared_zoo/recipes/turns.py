"""Many questions about one clip in one sequence, each as if it were alone with the clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pared_zoo.recipes.base import Batch
from pared_zoo.recipes.chat import END, START
from pared_zoo.world import Question

IGNORED = -100


class Turns:
    """Lays out questions and answers behind a clip.

    Args:
        tokenizer: of ``pared_zoo.recipes.chat``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        #: What stands before the tokens of a clip.
        self.opening: list[int] = self._ids(f"{START}user")

    def pack(self, asked: Sequence[Sequence[Question]]) -> Batch:
        """Tokens behind each clip, padded to the longest.

        Returns:
            ``ids`` (clips, tokens); ``labels``, the next token where that belongs to an answer, else ``IGNORED``;
            ``turns``, the number of the question a token belongs to, from 1, and 0 for padding; ``offsets``, the place
            of a token behind the clip when its question is asked alone. All int64.
        """
        rows = [[self._turn(q) for q in questions] for questions in asked]
        length = max((sum(len(ids) for ids, _ in row) for row in rows), default=0)
        shape = (len(rows), length)
        batch = {name: np.zeros(shape, dtype=np.int64) for name in ("ids", "turns", "offsets")}
        batch["labels"] = np.full(shape, IGNORED)
        for i, row in enumerate(rows):
            start = 0
            for number, (ids, answer) in enumerate(row, 1):
                span = slice(start, start + len(ids))
                batch["ids"][i, span] = ids
                batch["turns"][i, span] = number
                batch["offsets"][i, span] = np.arange(len(ids))
                batch["labels"][i, span.stop - answer - 1 : span.stop - 1] = ids[-answer:]
                start = span.stop
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _turn(self, question: Question) -> tuple[list[int], int]:
        """(tokens of a question and its answer, how many of them are the answer with its end)."""
        asked = self._ids(f" {question.text}{END}{START}assistant")
        answer = self._ids(f" {question.answer}{END}")
        return asked + answer, len(answer)

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text)["input_ids"]
        return self._known[text]


def turn_mask(turns: torch.Tensor, prefix: int) -> torch.Tensor:
    """Causal attention in which a turn sees the ``prefix`` and itself, bool (rows, 1, tokens, tokens)."""
    number = torch.nn.functional.pad(turns, (prefix, 0), value=-1)
    same = (number[:, None, :] == -1) | (number[:, None, :] == number[:, :, None])
    return (same & torch.ones_like(same[0]).tril())[:, None]


def right_answers(logits: torch.Tensor, labels: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Whether greedy decoding gives each answer to the last token: float (rows, questions), NaN for no question."""
    asked = labels != IGNORED
    wrong = (logits.argmax(-1) != labels) & asked
    size = (len(turns), int(turns.max()) + 1)
    count = torch.zeros(size, device=turns.device).scatter_add_(1, turns, asked.float())
    errors = torch.zeros(size, device=turns.device).scatter_add_(1, turns, wrong.float())
    return torch.where(count > 0, (errors == 0).float(), torch.nan)[:, 1:]
