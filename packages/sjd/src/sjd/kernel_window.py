"""`KernelWindow`: a `Window` that takes logits, and leaves softmax, test and resampling to fused kernels."""

from __future__ import annotations

from typing import Any

import torch
from pared_kernels import sjd_gumbel_argmax, sjd_step, sjd_topk_threshold
from torch import Tensor

from sjd.config import SJDConfig
from sjd.functional.drafts import SAMPLED
from sjd.processing import Processing
from sjd.window import Window

CERTAIN, UNIFORM = -1, -2


class KernelWindow(Window):
    """What stands at each place is the same as with `Window`; the laws are not copied, but found by row.

    `stored` (rows, width, columns) are the distributions of the pass before, `source` (rows, size) the one of them that
    a draft was drawn from, or that it is certain or uniform.
    """

    def __init__(self, *args: Any, processing: Processing, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.processing = processing
        rows = len(self.known)
        self.stored = torch.zeros(rows, 0, self.columns, dtype=self.dtype, device=self.device)
        self.source = torch.full((rows, 0), CERTAIN, dtype=torch.int64, device=self.device)

    @staticmethod
    def why_not(config: SJDConfig, processing: Processing, whole: bool) -> str | None:
        """Why the kernels cannot run what was asked, or None; `whole` tells that every column is allowed."""
        if config.init in SAMPLED:
            return f"init {config.init!r} keeps further distributions"
        if not processing.plain or processing.top_p is not None:
            return "top-p and further processors need whole rows"
        if config.relax:
            return "relax needs the neighbours of a draft"
        if config.init == "uniform" and not whole:
            return "uniform drafts cover a part of the columns"
        return None

    def select(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        super().select(rows)
        self.stored, self.source = self.stored[rows], self.source[rows]

    def _step(self, columns: Tensor, target: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, width, count = target.shape
        limit = self.ends - self.committed
        valid = positions[:, :-1] < (self.ends - self.margin)[:, None]
        forced = self.forced()
        forced = None if forced is None else torch.where(forced >= 0, 0, -1)
        if self.verify == "match":
            probs = self.processing.probs(target, None, None, forced)
            tokens = self._drawn(probs, positions)
            leading = ((tokens[:, :-1] == columns) & valid).long().cumprod(1).sum(1)
            return tokens, torch.minimum(leading + 1, limit), probs
        threshold = None
        if self.processing.top_k and self.processing.top_k < count:
            threshold = sjd_topk_threshold(target.flatten(0, 1), self.processing.top_k).view(rows, width)
        u_accept, u_sample = self.draw((rows, width - 1)), self.draw((rows, width))
        self.peak_bytes = max(self.peak_bytes, self.stored.nbytes + target.numel() * 4)
        tokens, counts, probs = sjd_step(
            target,
            columns,
            self.stored,
            self.source,
            u_accept,
            u_sample,
            threshold=threshold,
            forced=forced,
            valid=valid,
            limit=limit,
            temperature=self.processing.temperature,
            maximal=self.refresh == "maximal",
        )
        if self.refresh == "gumbel":
            # Behind what was tested, the noise of a position draws its token; so it does where nothing was rejected.
            place = torch.arange(width, device=self.device)
            rejected = torch.zeros_like(tokens, dtype=torch.bool)
            rejected[:, :-1] = (place[:-1] == counts[:, None] - 1) & valid
            tested = (place < counts[:, None] - 1) | rejected
            tokens = torch.where(tested, tokens, self._drawn(probs, positions))
        return tokens, counts, probs

    def _drawn(self, probs: Tensor, positions: Tensor) -> Tensor:
        return sjd_gumbel_argmax(probs, self.row, positions, seed=self.seed, stream=self.stream, first=self.offset)

    def _keep_laws(
        self, target: Tensor, counts: Tensor, index: Tensor, fill: Tensor, forced: Tensor, law: str | Tensor
    ) -> None:
        place = torch.arange(self.size, device=self.device)
        self.stored = target
        first = torch.full_like(index, CERTAIN)
        if law == "uniform":
            first = torch.where(forced.gather(1, index.clamp(min=0)), CERTAIN, UNIFORM)
        self.source = torch.where(index >= 0, first, counts[:, None] + place)
