"""What a generation did, image by image."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ImageStats:
    """One row: how many tokens each pass committed (`committed`, the prompt's pass first), and how."""

    committed: list[int] = field(default_factory=list)
    window: int = 0
    ended_inside: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that were generated."""
        return sum(self.committed)

    @property
    def passes(self) -> int:
        """Forward passes of the conditional model (NFE), that of the prompt included."""
        return len(self.committed)

    def tested(self) -> tuple[list[int], list[int]]:
        """By place in the window: how often its draft was tested, and accepted."""
        tested, accepted = [0] * self.window, [0] * self.window
        for number, count in enumerate(self.committed):
            # The prompt's pass has no drafts; one that ends the row may have stopped before a test failed.
            last = number == len(self.committed) - 1
            for place in range(min(count, self.window) if number else 0):
                tested[place] += not (last and place == count - 1)
                accepted[place] += place < count - 1
        return tested, accepted

    def accepted_places(self) -> list[tuple[int, bool]]:
        """For each token: the pass that committed it, and whether it was a draft that was accepted."""
        return [
            (number, place < count - 1)
            for number, count in enumerate(self.committed)
            for place in range(count)
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Tokens, passes, their ratio, and a histogram of committed lengths."""
        return {
            "tokens": self.tokens,
            "nfe": self.passes,
            "ratio": self.tokens / self.passes if self.passes else 0.0,
            "committed": dict(sorted(Counter(self.committed[1:]).items())),
        }


@dataclass
class Run:
    """One call: its images, and what belongs to the whole batch."""

    images: list[ImageStats]
    mode: str
    window: int
    seconds: float = 0.0
    passes: int = 0
    survived: tuple[int, int] = (0, 0)
    relax_bound: tuple[float, float] = (0.0, 0.0)
    probability_bytes: int = 0
    cache_bytes: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all images."""
        return sum(image.tokens for image in self.images)


def summary(runs: list[Run]) -> dict[str, Any]:
    """The statistics of several calls, as `SJDHandle.stats` returns them."""
    images = [image for run in runs for image in run.images]
    widest = max((run.window for run in runs), default=0)
    tested, accepted = [0] * widest, [0] * widest
    for image in images:
        for place, (all_of_them, passed) in enumerate(zip(*image.tested(), strict=True)):
            tested[place] += all_of_them
            accepted[place] += passed
    tokens, nfe = sum(image.tokens for image in images), sum(image.passes for image in images)
    passes, seconds = sum(run.passes for run in runs), sum(run.seconds for run in runs)
    unchanged, behind = (sum(run.survived[i] for run in runs) for i in (0, 1))
    bound, bounded = (sum(run.relax_bound[i] for run in runs) for i in (0, 1))
    histogram: Counter[int] = Counter()
    for image in images:
        histogram.update(image.committed[1:])
    return {
        "requests": len(runs),
        "mode": runs[-1].mode if runs else None,
        "windows": sorted({run.window for run in runs}),
        "images": [image.to_dict() for image in images],
        "tokens": tokens,
        "nfe": nfe,
        "ratio": tokens / nfe if nfe else None,
        "committed": dict(sorted(histogram.items())),
        "acceptance": [
            passed / all_of_them if all_of_them else None for passed, all_of_them in zip(accepted, tested, strict=True)
        ],
        "survival": unchanged / behind if behind else None,
        "ms_per_pass": 1e3 * seconds / passes if passes else None,
        "probability_bytes": max((run.probability_bytes for run in runs), default=0),
        "cache_bytes": max((run.cache_bytes for run in runs), default=0),
        "relax_tv_bound": bound / bounded if bounded else None,
    }
