"""One iteration of speculative Jacobi decoding, step by step."""

from __future__ import annotations

import torch
from torch import Tensor


def sjd_step(
    logits: Tensor,
    drafts: Tensor,
    previous: Tensor,
    source: Tensor,
    u_accept: Tensor,
    u_sample: Tensor,
    threshold: Tensor | None,
    forced: Tensor,
    valid: Tensor,
    limit: Tensor,
    temperature: float,
    maximal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `pared_kernels.sjd_step` does."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    columns, window = logits.shape[2], drafts.shape[1]
    scores = logits.to(wide)
    if threshold is not None:
        scores = scores.masked_fill(scores < threshold.to(wide)[..., None], -torch.inf)
    p = (scores / temperature).softmax(-1)
    p = torch.where((forced >= 0)[..., None], _one_hot(forced.clamp(min=0), p), p)

    if previous.shape[1]:
        q = previous.to(wide).gather(1, source.clamp(min=0)[..., None].expand(-1, -1, columns))
    else:
        q = torch.zeros_like(p[:, :window])
    q = torch.where((source == -1)[..., None], _one_hot(drafts, p[:, :window]), q)
    q = torch.where((source == -2)[..., None], torch.full_like(q, 1 / columns), q)

    p_draft, q_draft = (law[:, :window].gather(-1, drafts[..., None]).squeeze(-1) for law in (p, q))
    accepted = (u_accept.to(wide) * q_draft < p_draft) & valid
    residual = (p[:, :window] - q).clamp(min=0)
    empty = ~(residual.sum(-1, keepdim=True) > 0) | ~valid[..., None]
    residual = torch.cat((torch.where(empty, p[:, :window], residual), p[:, window:]), 1)
    resampled = _select(residual, u_sample)
    leading = accepted.long().cumprod(1).sum(1)
    place = torch.arange(window + 1, device=logits.device)
    padded = torch.nn.functional.pad(drafts, (0, 1))
    if maximal:
        tokens = torch.where(torch.nn.functional.pad(accepted, (0, 1)), padded, resampled)
    else:
        behind = torch.where(place == leading[:, None], resampled, _select(p, u_sample))
        tokens = torch.where(place < leading[:, None], padded, behind)
    return tokens, torch.minimum(leading + 1, limit), p


def _one_hot(column: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter_(-1, column[..., None], 1.0)


def _select(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The smallest column at which the cumulative sum in float64 exceeds its share of the total."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    wanted = uniforms.double()[..., None] * cumulative[..., -1:]
    column = torch.searchsorted(cumulative, wanted, right=True).clamp(max=weights.shape[-1] - 1)
    possible = weights.gather(-1, column) > 0
    return torch.where(possible, column, weights.argmax(-1, keepdim=True)).squeeze(-1)
