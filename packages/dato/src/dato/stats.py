"""What a patched denoiser did: calls by action, tokens kept, FLOPs saved, seconds, memory."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pared_hooks import UnsupportedModelError

from dato.functional import FULL
from dato.policy import action_name

if TYPE_CHECKING:
    from dato.costs import UnitCosts
    from dato.state import Call


@dataclass(frozen=True)
class _PrunedCall:
    """One pruned block at a latent of `shape`: `num_kept` of `num_tokens` tokens attended."""

    shape: tuple[int, ...]
    site: str
    num_tokens: int
    num_kept: int
    matched: bool
    """Whether the block made its own token plan."""


class Statistics:
    """Counts since the last reset; tensors are never read, so nothing waits for a GPU."""

    def __init__(self) -> None:
        self.timing = False
        self.reset()

    def reset(self) -> None:
        """Start counting from zero."""
        self._calls: Counter[tuple[tuple[int, ...], int]] = Counter()
        self._pruned: Counter[_PrunedCall] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._num_bytes = self._peak_bytes = 0
        self._started = 0.0
        self._controlnet = Counter[str]()

    def start(self, device: torch.device) -> None:
        """Note the start of a denoiser call when timing is on."""
        if self.timing:
            _wait(device)
            self._started = time.perf_counter()

    def finish(self, call: Call, num_bytes: int) -> None:
        """Count a denoiser call."""
        self._calls[tuple(call.sample.shape), call.depth] += 1
        self._num_bytes, self._peak_bytes = num_bytes, max(num_bytes, self._peak_bytes)
        if self.timing:
            _wait(call.sample.device)
            self._seconds[action_name(call.depth)] += time.perf_counter() - self._started

    def prune(self, call: Call, site: str, num_tokens: int, num_kept: int, *, matched: bool) -> None:
        """Count one pruned block call."""
        self._pruned[_PrunedCall(tuple(call.sample.shape), site, num_tokens, num_kept, matched)] += 1

    def controlnet(self, action: str) -> None:
        """Count one ControlNet call, "computed" or "reused"."""
        self._controlnet[action] += 1

    def note_memory(self, num_bytes: int) -> None:
        """Note the bytes held by the stores between calls."""
        self._num_bytes = num_bytes

    def as_dict(self, costs: Callable[[tuple[int, ...]], UnitCosts]) -> dict[str, Any]:
        """All counts as plain numbers; `costs(sample_shape)` counts the model's FLOPs."""
        calls: Counter[str] = Counter()
        for (_, depth), count in self._calls.items():
            calls[action_name(depth)] += count
        return {
            "calls": dict(calls),
            "tokens_kept": self._tokens_kept(),
            "flops": self._estimated_flops(costs),
            "seconds": dict(self._seconds) if self.timing else None,
            "memory_bytes": self._num_bytes,
            "peak_memory_bytes": self._peak_bytes,
            "controlnet": dict(self._controlnet),
        }

    def _tokens_kept(self) -> dict[str, dict[str, float]]:
        """By block: its tokens, the mean number kept at pruned calls, the pruned calls and the plans made for them."""
        blocks: dict[str, dict[str, float]] = {}
        for pruned, count in self._pruned.items():
            block = blocks.setdefault(pruned.site, {"tokens": 0.0, "kept": 0.0, "calls": 0, "plans": 0})
            calls = block["calls"] + count
            for key, value in (("tokens", pruned.num_tokens), ("kept", pruned.num_kept)):
                block[key] += (value - block[key]) * count / calls
            block["calls"] = calls
            block["plans"] += count * pruned.matched
        return blocks

    def _estimated_flops(self, costs: Callable[[tuple[int, ...]], UnitCosts]) -> dict[str, float] | None:
        try:
            return self._flops(costs)
        except UnsupportedModelError:
            # A denoiser with a kind of conditioning that the FLOP model cannot make up runs all the same.
            return None

    def _flops(self, costs: Callable[[tuple[int, ...]], UnitCosts]) -> dict[str, float]:
        names = ("without_dato", "saved_by_cache", "saved_by_skip", "saved_by_pruning", "matching")
        flops = dict.fromkeys(names, 0.0)
        for (shape, depth), count in self._calls.items():
            full = costs(shape).full
            flops["without_dato"] += count * full
            if depth == 0:
                flops["saved_by_skip"] += count * full
            elif depth != FULL:
                flops["saved_by_cache"] += count * (full - costs(shape).depth[depth])
        for pruned, count in self._pruned.items():
            of_shape = costs(pruned.shape)
            for attention in of_shape.attention:
                if not attention.name.startswith(f"{pruned.site}."):
                    continue
                flops["saved_by_pruning"] += count * (attention.total - attention.kept(pruned.num_kept))
                if pruned.matched and attention.plans:
                    flops["matching"] += count * of_shape.matching(attention, pruned.num_tokens - pruned.num_kept)
        saved = flops["saved_by_cache"] + flops["saved_by_skip"] + flops["saved_by_pruning"]
        return {**flops, "with_dato": flops["without_dato"] - saved + flops["matching"]}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
