"""What is kept between the calls on one model: its adapter, compiled passes, statistics, and the chosen window."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sjd.adapters import adapter_of
from sjd.adapters.base import Adapter
from sjd.config import WINDOWS, SJDConfig
from sjd.engine import Engine, Request
from sjd.stats import Run, summary

DEFAULT_WINDOW = 31


class Session:
    """The method on one model. `run` generates; `stats` tells what the generations since `reset` did."""

    def __init__(self, model: Any, config: SJDConfig | None = None, adapter: Adapter | None = None) -> None:
        self.config = SJDConfig() if config is None else config
        self.adapter = adapter_of(model) if adapter is None else adapter
        self.runs: list[Run] = []
        # Tokens per second of each window; only earlier images decide, so the choice knows nothing of the drafts.
        self.rates: dict[int, list[float]] = {}
        self._compiled: Callable[..., Tensor] | None = None

    def run(self, request: Request) -> tuple[Tensor, Tensor]:
        """Tokens (B, length) int64 and the length of each row (B,); raises what `Engine.run` raises."""
        size = self.window()
        engine = Engine(self.adapter, request, self.config, size, logits=self._logits())
        found = engine.run()
        report = engine.report()
        self.runs.append(report)
        self.rates.setdefault(size, []).append(report.tokens / max(report.seconds, 1e-9))
        return found

    def window(self) -> int:
        """Drafts per pass of the next call: each of `WINDOWS` once, then the one with the best median rate."""
        if isinstance(self.config.window, int):
            return self.config.window
        for size in sorted(WINDOWS, key=lambda size: abs(size - DEFAULT_WINDOW)):
            if size not in self.rates:
                return size
        return max(WINDOWS, key=lambda size: statistics.median(self.rates[size]))

    def stats(self) -> dict[str, Any]:
        """Statistics of the calls since the last reset."""
        return summary(self.runs)

    def reset(self) -> None:
        """Forget statistics and rates."""
        self.runs.clear()
        self.rates.clear()

    def _logits(self) -> Callable[..., Tensor] | None:
        if self.config.compile == "off":
            return None
        if self._compiled is None:
            self._compiled = torch.compile(self.adapter.logits, mode=self.config.compile, dynamic=False)
        return self._compiled
