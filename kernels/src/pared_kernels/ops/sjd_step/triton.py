"""One program a position: the softmax and its sums by block, then one block in which the drawn column lies.

Block sums are kept in registers, so the cumulative sum over the vocabulary is never written; a second kernel, one
program a row, finds the first rejection.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NOWHERE = tl.constexpr(2**30)
WIDEST = 2**18


@triton.jit
def _scores(logits_ptr, column, columns, threshold, temperature, HAS_THRESHOLD: tl.constexpr):
    """Logits over temperature, -inf where they are left out."""
    x = tl.load(logits_ptr + column, column < columns, other=float("-inf")).to(tl.float32)
    z = x / temperature
    if HAS_THRESHOLD:
        z = tl.where(x < threshold, float("-inf"), z)
    return z


@triton.jit
def _laws(logits_ptr, previous_ptr, column, columns, threshold, temperature, largest, total, forced, draft, source,
          tested, HAS_THRESHOLD: tl.constexpr):  # fmt: skip
    """p and the residual max(0, p - q) of some columns; the residual is p where nothing is tested."""
    z = _scores(logits_ptr, column, columns, threshold, temperature, HAS_THRESHOLD)
    p = tl.exp(z - largest) / total
    p = tl.where(forced >= 0, tl.where(column == forced, 1.0, 0.0), p)
    p = tl.where(column < columns, p, 0.0)
    stored = tl.load(previous_ptr + column, column < tl.where(source >= 0, columns, 0), other=0.0)
    certain = tl.where(column == draft, 1.0, 0.0)
    q = tl.where(source >= 0, stored, tl.where(source == -1, certain, 1.0 / columns))
    q = tl.where(tested, q, 0.0)
    return p, tl.maximum(p - q, 0.0)


@triton.jit
def _first_block(sums, index, wanted):
    """The first block whose cumulative sum exceeds what is wanted, and the sum in front of it."""
    reached = (tl.cumsum(sums, 0) > wanted) & (sums > 0)
    block = tl.min(tl.where(reached, index, NOWHERE), 0)
    # The rounded share may reach the total itself.
    block = tl.where(block == NOWHERE, tl.max(tl.where(sums > 0, index, 0), 0), block)
    return block, tl.sum(tl.where(index < block, sums, 0.0), 0)


@triton.jit
def _first_column(weights, column, before, wanted):
    reached = (before + tl.cumsum(weights.to(tl.float64), 0) > wanted) & (weights > 0)
    found = tl.min(tl.where(reached, column, NOWHERE), 0)
    return tl.where(found == NOWHERE, tl.max(tl.where(weights > 0, column, 0), 0), found)


@triton.jit
def test_kernel(logits_ptr, draft_ptr, previous_ptr, source_ptr, u_accept_ptr, u_sample_ptr, threshold_ptr, forced_ptr,
                valid_ptr, probs_ptr, accepted_ptr, resampled_ptr, fresh_ptr, columns, window, temperature,
                stride_logits_batch, stride_logits, stride_previous_batch, stride_previous, HAS_THRESHOLD: tl.constexpr,
                MAXIMAL: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    place = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * (window + 1) + place
    test = batch * window + place
    has_draft = place < window
    logits = logits_ptr + batch * stride_logits_batch + place.to(tl.int64) * stride_logits
    threshold = tl.load(threshold_ptr + row) if HAS_THRESHOLD else 0.0
    forced = tl.load(forced_ptr + row)
    draft = tl.load(draft_ptr + test, has_draft, other=0)
    source = tl.load(source_ptr + test, has_draft, other=-1)
    tested = has_draft & (tl.load(valid_ptr + test, has_draft, other=0) != 0)
    previous = previous_ptr + batch * stride_previous_batch + tl.maximum(source, 0) * stride_previous

    column = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    masses = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        z = _scores(logits, start + column, columns, threshold, temperature, HAS_THRESHOLD)
        higher = tl.maximum(peaks, z)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        masses = masses * tl.exp(peaks - shift) + tl.exp(z - shift)
        peaks = higher
    largest = tl.max(peaks, 0)
    total = tl.sum(masses * tl.exp(peaks - largest), 0)

    index = tl.arange(0, BLOCKS)
    sums = tl.zeros((BLOCKS,), tl.float64)
    surplus = tl.zeros((BLOCKS,), tl.float64)
    for start in range(0, columns, BLOCK):
        p, left = _laws(logits, previous, start + column, columns, threshold, temperature, largest, total, forced,
                        draft, source, tested, HAS_THRESHOLD)  # fmt: skip
        tl.store(probs_ptr + row * columns + start + column, p, start + column < columns)
        here = index == start // BLOCK
        sums = tl.where(here, tl.sum(p.to(tl.float64), 0), sums)
        surplus = tl.where(here, tl.sum(left.to(tl.float64), 0), surplus)

    z = tl.load(logits + draft).to(tl.float32)
    p_draft = tl.exp(z / temperature - largest) / total
    if HAS_THRESHOLD:
        p_draft = tl.where(z < threshold, 0.0, p_draft)
    p_draft = tl.where(forced >= 0, tl.where(draft == forced, 1.0, 0.0), p_draft)
    q_draft = tl.load(previous + draft, source >= 0, other=0.0)
    q_draft = tl.where(source >= 0, q_draft, tl.where(source == -1, 1.0, 1.0 / columns))
    u = tl.load(u_accept_ptr + test, has_draft, other=1.0).to(tl.float32)
    tl.store(accepted_ptr + test, (tested & (u * q_draft < p_draft)).to(tl.uint8), has_draft)

    u = tl.load(u_sample_ptr + row).to(tl.float64)
    all_left = tl.sum(surplus, 0)
    # Only rounding leaves nothing where a draft was rejected.
    nothing = ~(all_left > 0)
    weights = tl.where(nothing, sums, surplus)
    wanted = u * tl.where(nothing, tl.sum(sums, 0), all_left)
    block, before = _first_block(weights, index, wanted)
    p, left = _laws(logits, previous, block * BLOCK + column, columns, threshold, temperature, largest, total, forced,
                    draft, source, tested, HAS_THRESHOLD)  # fmt: skip
    found = _first_column(tl.where(nothing, p, left), block * BLOCK + column, before, wanted)
    tl.store(resampled_ptr + row, found.to(tl.int64))
    if not MAXIMAL:
        wanted = u * tl.sum(sums, 0)
        block, before = _first_block(sums, index, wanted)
        p, left = _laws(logits, previous, block * BLOCK + column, columns, threshold, temperature, largest, total,
                        forced, draft, source, tested, HAS_THRESHOLD)  # fmt: skip
        found = _first_column(p, block * BLOCK + column, before, wanted)
        tl.store(fresh_ptr + row, found.to(tl.int64))


@triton.jit
def commit_kernel(draft_ptr, accepted_ptr, resampled_ptr, fresh_ptr, limit_ptr, tokens_ptr, committed_ptr, window,
                  MAXIMAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    has_draft = place < window
    accepted = tl.load(accepted_ptr + batch * window + place, has_draft, other=0) != 0
    draft = tl.load(draft_ptr + batch * window + place, has_draft, other=0)
    inside = place <= window
    leading = tl.min(tl.where(accepted, NOWHERE, place), 0)
    tokens = tl.load(resampled_ptr + batch * (window + 1) + place, inside, other=0)
    if MAXIMAL:
        tokens = tl.where(accepted, draft, tokens)
    else:
        fresh = tl.load(fresh_ptr + batch * (window + 1) + place, inside, other=0)
        tokens = tl.where(place == leading, tokens, fresh)
        tokens = tl.where(place < leading, draft, tokens)
    tl.store(tokens_ptr + batch * (window + 1) + place, tokens, inside)
    tl.store(committed_ptr + batch, tl.minimum((leading + 1).to(tl.int64), tl.load(limit_ptr + batch)))


def constants(columns: int, threshold: bool, maximal: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constants of the first kernel and its launch options."""
    block = 2048 if columns <= 16384 else 4096
    chosen = {
        "HAS_THRESHOLD": threshold,
        "MAXIMAL": maximal,
        "BLOCK": block,
        "BLOCKS": triton.next_power_of_2(triton.cdiv(columns, block)),
    }
    return chosen, {"num_warps": 8, "enable_fp_fusion": True}


def commit_constants(window: int, maximal: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the constants of the second kernel and its launch options."""
    return {"MAXIMAL": maximal, "BLOCK": triton.next_power_of_2(window + 1)}, {
        "num_warps": 1,
        "enable_fp_fusion": True,
    }  # fmt: skip


def unsupported(logits: Tensor, *rest: Any) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    if logits.dtype == torch.float64:
        return "float64 is left to the reference"
    return f"more than {WIDEST} columns" if logits.shape[2] > WIDEST else None


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
    batch, width, columns = logits.shape
    window = width - 1
    tokens = drafts.new_empty((batch, width))
    committed = drafts.new_empty(batch)
    probs = logits.new_empty(logits.shape, dtype=torch.float32)
    if batch == 0:
        return tokens, committed, probs
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    previous = previous if previous.stride(-1) == 1 else previous.contiguous()
    drafts, source, valid = drafts.contiguous(), source.contiguous(), valid.contiguous().view(torch.uint8)
    accepted = torch.empty((batch, window), dtype=torch.uint8, device=logits.device)
    resampled = torch.empty_like(tokens)
    fresh = resampled if maximal else torch.empty_like(tokens)
    chosen, options = constants(columns, threshold is not None, maximal)
    test_kernel[(width, batch)](
        logits, drafts, previous, source, u_accept.contiguous(), u_sample.contiguous(),
        probs if threshold is None else threshold.float().contiguous(), forced.contiguous(), valid,
        probs, accepted, resampled, fresh, columns, window, float(temperature),
        *logits.stride()[:2], *previous.stride()[:2], **chosen, **options,
    )  # fmt: skip
    chosen, options = commit_constants(window, maximal)
    commit_kernel[(batch,)](
        drafts, accepted, resampled, fresh, limit.contiguous(), tokens, committed, window, **chosen, **options
    )
    return tokens, committed, probs
