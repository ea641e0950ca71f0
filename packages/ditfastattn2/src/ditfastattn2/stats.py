"""Counting what the calls of a patched denoiser computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


class Statistics:
    """Counters since the last reset."""

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = tuple(layers)
        self.reset()

    def reset(self) -> None:
        """Set all counters to zero."""
        self.calls = 0
        self.cache_misses = 0
        self.beyond_plan = 0
        self.skipped_projections = 0
        self.dense: Counter[str] = Counter()
        self.peak_cache_bytes = 0
        self._full = [0.0] * len(self._layers)
        self._computed = [0.0] * len(self._layers)

    def count(self, layer: int, full: float, computed: float) -> None:
        """Add FLOPs of one attention: what it would cost in full, and what was computed."""
        self._full[layer] += full
        self._computed[layer] += computed

    def note_memory(self, num_bytes: int) -> None:
        """Note how much the caches hold now."""
        self.peak_cache_bytes = max(self.peak_cache_bytes, num_bytes)

    def as_dict(self, cache_bytes: int) -> dict[str, Any]:
        """Return the counters under plain names."""
        full, computed = sum(self._full), sum(self._computed)
        return {
            "calls": self.calls,
            "attention_flops": {"full": full, "computed": computed},
            "removed": 1 - computed / full if full else 0.0,
            "removed_by_layer": {
                name: 1 - done / whole
                for name, whole, done in zip(self._layers, self._full, self._computed, strict=True)
                if whole
            },
            "cache_misses": self.cache_misses,
            "beyond_plan": self.beyond_plan,
            "dense": dict(self.dense),
            "skipped_projections": self.skipped_projections,
            "cache_bytes": cache_bytes,
            "peak_cache_bytes": self.peak_cache_bytes,
        }
