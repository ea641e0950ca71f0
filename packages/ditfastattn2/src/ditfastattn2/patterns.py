"""Looking at the attention of a model's heads: how much of it is near, how much meets text (the paper's section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pared_hooks import DenoiserView, Patch
from torch import Tensor

from ditfastattn2.adapters.base import view_of
from ditfastattn2.apply import OWNER
from ditfastattn2.config import DiTFastAttnV2Config
from ditfastattn2.heads import Inputs, full_attention
from ditfastattn2.interception import Hook
from ditfastattn2.layout import Tokens
from ditfastattn2.run import Call, HeadwiseRun


@dataclass(frozen=True)
class HeadPattern:
    """One head, averaged over steps, samples and rows; shares of attention.

    `band` is the share of the picture's attention to itself that falls within the window, one value a sample: how much
    they differ says whether it depends on the prompt. `to_text` is what the picture gives to text, `from_text` what
    text gives to the picture, `text_spread` the entropy of the picture's attention over text tokens as a share of its
    maximum. `similarity` is the cosine of the head's output to that of the step before. `map` (cells, cells) is the
    mean attention in coarse cells of the sequence, the picture first; it is the share `vision_share` of it.
    """

    layer: str
    head: int
    band: tuple[float, ...]
    to_text: float
    from_text: float
    text_spread: float
    similarity: float
    vision_share: float
    map: Tensor


class _Observer(HeadwiseRun):
    """Full attention everywhere, looked at on the way."""

    def __init__(self, view: DenoiserView, pipeline: Any, window: tuple[int, int], cells: int) -> None:
        super().__init__(view, pipeline, DiTFastAttnV2Config())
        self._window = window
        self._cells = cells
        self._before: dict[tuple[str, int], Tensor] = {}
        self.sums: dict[int, list[dict[str, Tensor]]] = {}
        self.vision_share: dict[int, float] = {}

    def prepare(self, call: Call) -> None:
        pass

    def run_site(self, hook: Hook, call: Call, inputs: Inputs) -> Tensor:
        out = full_attention(inputs)
        q, k, sequence, scale = inputs.q, inputs.k, inputs.sequence, inputs.scale
        key = (call.branch, hook.index)
        before = self._before.get(key)
        self._before[key] = out
        if before is None or before.shape != out.shape:
            return out
        vision, text = _positions(sequence, q.device)
        self.vision_share[hook.index] = len(vision) / q.shape[1]
        width = self._window[0] * len(vision) // self._window[1] // 2
        rows: dict[str, list[Tensor]] = {name: [] for name in ("band", "to_text", "from_text", "text_spread", "map")}
        for head in range(q.shape[2]):
            weights = _weights(q[:, :, head], k[:, :, head], scale)
            seen = weights[:, vision]
            near = (vision[:, None] - vision[None, :]).abs() <= width
            own = seen[:, :, vision]
            rows["band"].append((own * near).sum((1, 2)) / own.sum((1, 2)))
            rows["to_text"].append(seen[:, :, text].sum(2).mean())
            rows["from_text"].append(weights[:, text][:, :, vision].sum(2).mean())
            rows["text_spread"].append(_spread(seen[:, :, text]))
            rows["map"].append(
                _coarse(weights[:, torch.cat([vision, text])][:, :, torch.cat([vision, text])], self._cells)
            )
        looked = {name: torch.stack(values) for name, values in rows.items()}
        looked["similarity"] = torch.nn.functional.cosine_similarity(
            out.float().transpose(1, 2).flatten(2), before.float().transpose(1, 2).flatten(2), dim=2
        ).mean(0)
        self.sums.setdefault(hook.index, []).append(looked)
        return out


def head_patterns(
    pipeline: Any,
    run: Callable[[], object],
    *,
    window: tuple[int, int] = (1, 8),
    cells: int = 32,
) -> list[HeadPattern]:
    """Look at every head while `run()` lets the pipeline denoise; the first step is left out.

    `window` is the band, a share a/b of the picture; `cells` the side of the coarse maps. Costs a full matrix of
    attention for each head, so small pictures are for this. Raises what `apply` raises.
    """
    view = view_of(pipeline)
    observer = _Observer(view, pipeline if pipeline is not view.model else None, window, cells)
    with Patch(OWNER) as patch:
        try:
            observer.install(patch)
            with torch.no_grad():
                run()
        finally:
            patch.remove()
    patterns = []
    for hook in observer.hooks:
        steps = observer.sums.get(hook.index, [])
        for head in range(len(steps[0]["band"]) if steps else 0):
            mean = {name: torch.stack([one[name][head] for one in steps]).mean(0) for name in steps[0]}
            numbers = {name: float(mean[name]) for name in ("to_text", "from_text", "text_spread", "similarity")}
            share, band = observer.vision_share[hook.index], tuple(mean["band"].tolist())
            patterns.append(HeadPattern(hook.site.name, head, band, map=mean["map"], vision_share=share, **numbers))
    return patterns


def _positions(sequence: Tokens, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions of vision and of other tokens."""
    text = torch.arange(sequence.num_text, device=device)
    vision = torch.arange(sequence.num_vision, device=device)
    if sequence.text_first:
        return vision + sequence.num_text, text
    return vision, text + sequence.num_vision


def _weights(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return (q.float() @ k.float().transpose(1, 2) * factor).softmax(-1)


def _spread(weights: Tensor) -> Tensor:
    """Mean entropy of attention over the last dimension, as a share of that of equal attention; 1 for none."""
    if weights.shape[-1] < 2:
        return weights.new_ones(())
    share = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(-1)
    return entropy.mean() / torch.tensor(float(weights.shape[-1])).log()


def _coarse(weights: Tensor, cells: int) -> Tensor:
    """Mean weight (cells, cells) of (B, S, S)."""
    return torch.nn.functional.adaptive_avg_pool2d(weights.mean(0, keepdim=True), min(cells, weights.shape[1]))[0]


def local_share(patterns: Sequence[HeadPattern], mass: float = 0.8) -> float:
    """Share of the heads that keep at least `mass` of the picture's attention to itself within the band."""
    local = [sum(one.band) / len(one.band) >= mass for one in patterns]
    return sum(local) / len(local)
