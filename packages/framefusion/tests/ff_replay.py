"""Forwards without a cache in which a prompt's reduction is repeated and the tokens behind it stay."""

from __future__ import annotations

import torch
from framefusion.apply import install
from framefusion.config import FrameFusionConfig
from framefusion.functional.decision import Decision
from framefusion.functional.reducer import Reducer
from framefusion.functional.selection import Selection


class Replay(Reducer):
    """Applies recorded selections to the first tokens of one sequence, and keeps those that follow."""

    def prepare(self, selections, prompt):
        self.selections, self.prompt, self.now = selections, prompt, 0
        return self

    @property
    def active(self):
        return self.now < len(self.selections)

    @property
    def wants_importance(self):
        return False

    def step(self, hidden, importance=None):
        selection, self.now = self.selections[self.now], self.now + 1
        self.last = [Decision("none")]
        if selection is None:
            return hidden, None
        before, tail = self.prompt, hidden.shape[1] - self.prompt
        shorter = torch.cat((selection.apply(hidden[:, :before]), hidden[:, before:]), 1)
        self.prompt = selection.source.shape[1]
        rest = torch.arange(tail)[None]
        source = torch.cat((selection.source, before + rest), 1)
        group = torch.cat((selection.group, self.prompt + rest), 1)
        self.positions = self.positions.gather(1, source)
        return shorter, Selection(source, None, group)


def replayed(model, selections, prompt, layout=None):
    """A handle under which every prompt of the model has the recorded reduction."""

    def strategy(layout, valid, budgets):
        return Replay(FrameFusionConfig(), layout.patch, layout.stream, 4, valid, budgets).prepare(selections, prompt)

    return install(model, FrameFusionConfig(), strategy, layout, "replay")
