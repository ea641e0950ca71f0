"""How near the heads of a joint transformer look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def near_mass(pipeline: Any, prompts: Sequence[str], part: int, **options: Any) -> torch.Tensor:
    """What share of their attention to image tokens the heads give to those nearby, while the pipeline paints.

    Near are the image tokens at most ``tokens // part // 2`` places before or after, counted row by row.

    Args:
        pipeline: a ``StableDiffusion3Pipeline``; its processors are restored.
        prompts: what to paint.
        part: of how many parts of the picture one is near.
        options: further arguments of the pipeline's call.

    Returns:
        float32 (layers, heads) on the CPU, the mean over image tokens, prompts, steps and both halves of guidance.
    """
    transformer = pipeline.transformer
    before = dict(transformer.attn_processors)
    watching = {name: _Watch(inner, part) for name, inner in before.items()}
    transformer.set_attn_processor(dict(watching))
    try:
        pipeline(list(prompts), output_type="latent", **options)
    finally:
        transformer.set_attn_processor(before)
    return torch.stack([torch.stack(watch.shares).mean(dim=0) for watch in watching.values()]).cpu()


class _Watch:
    """A processor that notes what the inner one's heads do."""

    def __init__(self, inner: Any, part: int) -> None:
        self.inner, self.part = inner, part
        self.shares: list[torch.Tensor] = []

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        query, key = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).float().softmax(-1)
        at = torch.arange(weights.shape[-1], device=weights.device)
        near = (at[:, None] - at).abs() <= len(at) // self.part // 2
        self.shares.append((weights * near).sum(-1).mean(dim=(0, 2)))
        return self.inner(attn, hidden_states, *args, **kwargs)
