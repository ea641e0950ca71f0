"""One iteration on probabilities: which drafts are accepted, and which token stands at every position afterwards.

B rows, W drafts, V tokens. p is the distribution a position has in this pass, q the one its draft was drawn from.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sjd.functional.randomness import inverse_cdf

Refresh = Literal["independent", "maximal", "gumbel"]
Verify = Literal["speculative", "match"]


class StepResult(NamedTuple):
    """`tokens` (B, W + 1) int64 stand at the window's positions now; the first `committed` (B,) int64 are final."""

    tokens: Tensor
    committed: Tensor


def accept_lengths(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    """Return the number (B,) int64 of leading drafts with u < min(1, p / q) (arXiv 2410.01699, section 3.2).

    `draft_tokens` (B, W) int64, `draft_probs` (B, W, V) q, `target_probs` (B, W or more, V) p, `uniforms` (B, W) in
    [0, 1), `valid` (B, W) bool. The test is u q < p in the dtype of the probabilities; counting stops at the first
    draft that fails or is not valid. A draft with q = 0 was not drawn from q: it passes where p > 0, and on a CPU a
    RuntimeWarning names it.
    """
    return _leading(_accepted(draft_tokens, draft_probs, target_probs, uniforms, valid, None))


def residual_probs(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """Return max(0, p - q), normalised over the last dimension: the law of a token whose draft was rejected.

    Both (..., V). Where the positive part sums to 0, which only rounding can cause, or to a number that is not finite,
    the result is p, normalised.
    """
    surplus = (target_probs - draft_probs).clamp_(min=0)
    total = surplus.sum(-1, keepdim=True)
    degenerate = ~(total.isfinite() & (total > 0))
    surplus = torch.where(degenerate, target_probs, surplus)
    return surplus / torch.where(degenerate, target_probs.sum(-1, keepdim=True), total)


def expected_ratio(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """Return sum_v min(p, q) (...,): the probability that a draft drawn from q is accepted, 1 - TV(p, q)."""
    return torch.minimum(target_probs, draft_probs).sum(-1)


def window_step(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    u_accept: Tensor,
    u_sample: Tensor,
    *,
    refresh: Refresh,
    verify: Verify = "speculative",
    gumbel: Tensor | None = None,
    valid: Tensor | None = None,
    limit: Tensor | None = None,
    added: Tensor | None = None,
) -> StepResult:
    """Return the tokens of a window after one pass, and how many of them are final.

    The drafts that are not final are the next drafts, and **their q is the p of this pass**: that of accepted ones too.
    A draft that keeps its old q is tested twice against the same odds, and the output law is lost.

    - `refresh="independent"` (arXiv 2410.01699): test until the first rejection, resample there from max(0, p - q),
      draw everything behind from its p.
    - `refresh="maximal"` (arXiv 2510.24211): the same test and resampling at every position, so that a draft changes
      as seldom as its law allows.
    - `refresh="gumbel"`: behind the first rejection argmax(log p + noise), with noise that is fixed for a position.
    - `verify="match"`: argmax(log p + noise) everywhere, a draft is accepted if it is equal; argmax p for
      `gumbel=None`. Uniforms and `draft_probs` are not read; only the order of `target_probs` matters for argmax p.

    Args:
        draft_tokens: (B, W) int64; W may be 0.
        draft_probs: (B, W, V) q; target_probs: (B, W + 1, V) p, the last one behind all drafts.
        u_accept, u_sample: (B, W) and (B, W + 1), independent uniform numbers in [0, 1). `u_sample[:, k]` selects the
            token of position k where one is drawn, from p or from the residual.
        gumbel: (B, W + 1, V) noise.
        valid: (B, W) bool; a draft that is not valid is neither tested nor a rejection: its position is drawn from p.
        limit: (B,) int64, the largest number to commit; it does not change the tokens.
        added: (B, W), what is added to p of the draft in its test. Lossy: see `SJDConfig.relax`.

    Raises ValueError for an unknown `refresh` or `verify`, or a missing `gumbel` or `draft_probs`.
    """
    if verify == "match":
        scores = target_probs if gumbel is None else target_probs.log() + gumbel
        tokens = scores.argmax(-1)
        matches = tokens[:, :-1] == draft_tokens
        leading = _leading(matches if valid is None else matches & valid)
        return StepResult(tokens, _capped(leading + 1, limit))
    if verify != "speculative":
        raise ValueError(f"verify is {verify!r}; valid: 'speculative' or 'match'")
    if draft_probs is None:
        raise ValueError("draft_probs is None; valid: (B, W, V) unless verify='match'")
    accepted = _accepted(draft_tokens, draft_probs, target_probs, u_accept, valid, added)
    leading = _leading(accepted)
    if refresh == "maximal":
        # Where nothing may be tested, q = 0 makes the residual p.
        q = draft_probs if valid is None else draft_probs * valid[..., None]
        resampled = inverse_cdf(residual_probs(target_probs[:, :-1], q), u_sample[:, :-1])
        bonus = inverse_cdf(target_probs[:, -1:], u_sample[:, -1:])
        tokens = torch.cat((torch.where(accepted, draft_tokens, resampled), bonus), dim=1)
        return StepResult(tokens, _capped(leading + 1, limit))
    if refresh == "gumbel":
        if gumbel is None:
            raise ValueError("gumbel is None; valid: noise (B, W + 1, V) for refresh='gumbel'")
        tokens = (target_probs.log() + gumbel).argmax(-1)
    elif refresh == "independent":
        tokens = inverse_cdf(target_probs, u_sample)
    else:
        raise ValueError(f"refresh is {refresh!r}; valid: 'independent', 'maximal' or 'gumbel'")
    window = draft_tokens.shape[1]
    if window:
        place = torch.arange(window + 1, device=tokens.device)
        tokens[:, :-1] = torch.where(place[:-1] < leading[:, None], draft_tokens, tokens[:, :-1])
        # The first draft that was not accepted; a row without one is told apart by `rejected`.
        first = leading.clamp(max=window - 1)[:, None]
        rejected = leading < window if valid is None else (leading < window) & valid.gather(1, first).squeeze(1)
        rows = first[..., None].expand(-1, -1, target_probs.shape[-1])
        residual = residual_probs(target_probs.gather(1, rows), draft_probs.gather(1, rows))
        resampled = inverse_cdf(residual, u_sample.gather(1, first))
        tokens = torch.where((place == first) & rejected[:, None], resampled, tokens)
    return StepResult(tokens, _capped(leading + 1, limit))


def _accepted(
    draft_tokens: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    uniforms: Tensor,
    valid: Tensor | None,
    added: Tensor | None,
) -> Tensor:
    chosen = draft_tokens[..., None]
    q = draft_probs.gather(-1, chosen).squeeze(-1)
    p = target_probs[:, : draft_tokens.shape[1]].gather(-1, chosen).squeeze(-1)
    accepted = uniforms.to(q.dtype) * q < (p if added is None else p + added)
    if added is None and q.device.type == "cpu":
        _warn_of_other_laws((q == 0) if valid is None else (q == 0) & valid)
    return accepted if valid is None else accepted & valid


def _warn_of_other_laws(impossible: Tensor) -> None:
    if bool(impossible.any()):
        row, place = impossible.nonzero()[0].tolist()
        warnings.warn(
            f"draft {place} of row {row} has probability 0 in draft_probs: it was drawn from something else, and the "
            "output does not have the law of target_probs",
            RuntimeWarning,
            stacklevel=4,
        )


def _leading(accepted: Tensor) -> Tensor:
    return accepted.long().cumprod(1).sum(1)


def _capped(committed: Tensor, limit: Tensor | None) -> Tensor:
    return committed if limit is None else torch.minimum(committed, limit)
