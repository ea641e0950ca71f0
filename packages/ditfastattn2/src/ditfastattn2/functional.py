"""DiTFastAttnV2 as pure tensor functions: error of a head, the choice of methods, arrows, headwise attention.

Symbols: ``B`` samples, ``S = V + T`` tokens (vision and text), ``H`` heads, ``D`` channels of a head, ``w`` half width
of a band. Sections are those of the method (arXiv 2503.22796).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pared_kernels import dispatch, use
from pared_kernels import headwise_arrow_attention as fused_attention
from pared_kernels.ops.headwise_arrow_attention import cpu as visited_keys
from pared_kernels.ops.headwise_arrow_attention.geometry import Arrow, block_map, visited_pairs
from torch import Tensor

from ditfastattn2.flex import flex_attention
from ditfastattn2.methods import parse
from ditfastattn2.solver import solve

Block = tuple[int, int] | None

BACKENDS = ("auto", "triton", "flex", "sdpa")


def head_rse(candidate: Tensor, reference: Tensor) -> Tensor:
    """Relative squared error of each head, ``mean (y - y_full)^2 / var y_full`` over batch, tokens, channels (3.2).

    Both ``(B, S, H, D)`` of any floating dtype; returns ``(H,)`` in fp32, or fp64 for fp64 inputs. A head whose
    reference is constant has error 0 if the candidate equals it, else infinity.
    Raises ``ValueError`` when the shapes differ or are not four-dimensional.
    """
    if candidate.shape != reference.shape or candidate.dim() != 4:
        raise ValueError(
            "head_rse needs two tensors of one shape (B, S, H, D), "
            f"got {tuple(candidate.shape)} and {tuple(reference.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(candidate.dtype, reference.dtype), torch.float32)
    full, over = reference.to(dtype), (0, 1, 3)
    error = (candidate.to(dtype) - full).square().mean(over)
    spread = (full - full.mean(over, keepdim=True)).square().mean(over)
    # The mean of equal numbers is not exactly that number, so their spread is not exactly 0.
    constant = full.amax(over) == full.amin(over)
    return torch.where(constant, torch.where(error == 0, 0.0, torch.inf), error / spread)


def method_saving(method: str, num_vision: int, num_text: int) -> float:
    """Share of a full head's attention that the planner counts as saved by ``method`` (3.1).

    "full" 0, "cached" 1, "arrow:a/b" ``(V - w)^2 / (V + T)^2``; "+cfg" halves what remains to be computed.
    Raises ``ConfigError`` (a ``ValueError``) for an unknown method or an arrow without a band.
    """
    return parse(method).saving(num_vision, num_text)


def solve_head_plan(rse: Tensor, saving: Tensor, delta: float, coef: float | None = 1.5) -> Tensor:
    """Method of each head, ``(H,)`` int64, -1 for full: most saving with ``sum rse <= delta`` (3.3), exactly.

    ``rse`` (H, M), ``saving`` (M,) from 0 to 1. A method is open to a head if ``rse < coef * delta / H``; with
    ``coef`` None if its error alone fits. Of equal savings the least error wins, then the lower method, head by head.
    Raises ``ValueError`` for NaN or negative numbers and wrong shapes.
    """
    if rse.dim() != 2 or saving.shape != rse.shape[1:]:
        raise ValueError(f"rse {tuple(rse.shape)} and saving {tuple(saving.shape)} must be (H, M) and (M,)")
    if not bool((rse >= 0).all()):
        raise ValueError("rse has NaN or negative entries; errors are at least 0")
    if not bool(((saving >= 0) & (saving <= 1)).all()):
        raise ValueError(f"saving = {saving.tolist()} is not valid: shares from 0 to 1")
    if not (math.isfinite(delta) and delta >= 0):
        raise ValueError(f"delta = {delta!r} is not valid: delta must be >= 0")
    if coef is not None and not coef > 0:
        raise ValueError(f"coef = {coef!r} is not valid: coef must be > 0, or None")
    heads = rse.shape[0]
    if delta == 0 or rse.numel() == 0:
        return torch.full((heads,), -1)
    limit = math.inf if coef is None else coef * delta / heads
    errors, savings = (one.detach().double().cpu().numpy() for one in (rse, saving))
    return torch.tensor(solve(errors, savings, float(delta), limit))


def arrow_mask(num_vision: int, num_text: int, window: int, text_first: bool = False) -> Tensor:
    """Bool ``(S, S)``: pairs of the picture at most ``window`` apart, and all pairs with text (3.1); -1 keeps all.

    Raises ``ValueError`` for window 0, which skips a head and has no mask.
    """
    arrow = _arrow(num_vision, num_text, window, text_first)
    position = torch.arange(arrow.tokens)
    return arrow.keeps(position, position)


def arrow_block_map(
    num_vision: int, num_text: int, window: int, text_first: bool = False, block: tuple[int, int] = (128, 64)
) -> Tensor:
    """Bool ``(ceil(S / BM), ceil(S / BN))``: the smallest cover of ``arrow_mask`` with blocks ``(BM, BN)`` (3.7)."""
    return block_map(_arrow(num_vision, num_text, window, text_first), block)


def plan_density(
    windows: Tensor | Sequence[int], num_vision: int, num_text: int, text_first: bool, block: Block
) -> float:
    """Share of the ``S * S`` pairs that is computed, averaged over heads; skipped heads (window 0) count 0.

    ``block`` None counts the pairs of the masks themselves, else those of the visited blocks.
    """
    per_head = [int(window) for window in windows]
    pairs = sum(
        visited_pairs(_arrow(num_vision, num_text, window, text_first), block) for window in per_head if window != 0
    )
    return pairs / (len(per_head) * (num_vision + num_text) ** 2)


def headwise_arrow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor | Sequence[int],
    num_text: int,
    text_first: bool,
    block: Block = (128, 64),
    text_valid: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention with a window per head: -1 full, 0 skipped, above 0 half width of the band (3.1, 3.7).

    ``q``, ``k``, ``v`` ``(B, S, H, D)``; ``windows`` ``(H,)`` int32; ``block`` None takes the mask element by element;
    ``text_valid`` ``(B,)`` is the number of text tokens attended to. Skipped heads keep what ``out`` holds, or are zero
    without it. ``backend``: "triton" the fused kernel, "sdpa" torch's attention on the visited keys, "flex"
    FlexAttention, "auto" the kernel where Triton runs and "sdpa" elsewhere.

    Raises ``ValueError`` or ``TypeError`` for wrong arguments, ``BackendUnavailableError`` (a ``RuntimeError``) where
    the backend cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is not valid: one of {', '.join(BACKENDS)}")
    if backend == "flex":
        return flex_attention(q, k, v, windows, num_text, text_first, block, text_valid, scale, out)
    if q.device.type != "cpu" and (backend == "sdpa" or not dispatch.runs_triton(q.device)):
        out = torch.zeros_like(q, memory_format=torch.contiguous_format) if out is None else out
        per_head, scale = [int(window) for window in windows], q.shape[3] ** -0.5 if scale is None else scale
        visited_keys.headwise_arrow_attention(
            q, k, v, out, per_head, num_text, text_first, *(block or (0, 0)), text_valid, scale
        )
        return out
    with use(headwise_arrow_attention={"auto": "auto", "triton": "triton", "sdpa": "cpu"}[backend]):
        return fused_attention(
            q, k, v, windows, num_text, text_first, block=block, text_valid=text_valid, scale=scale, out=out
        )


def reorder_tokens(x: Tensor, num_text: int, frames: int, text_first: bool, inverse: bool = False) -> Tensor:
    """Turn vision tokens from frame-major to position-major order: patch p of frame f moves to ``p * F + f`` (3.6).

    ``x`` ``(B, S, H, D)``; text tokens stay. ``inverse`` turns them back.
    Raises ``ValueError`` when the vision tokens are not a multiple of ``frames``.
    """
    num_vision = x.shape[1] - num_text
    if frames < 1 or num_vision % frames:
        raise ValueError(f"frames = {frames} is not valid: a divisor of the {num_vision} vision tokens")
    order = (num_vision // frames, frames) if inverse else (frames, num_vision // frames)
    start = num_text if text_first else 0
    vision = x[:, start : start + num_vision].unflatten(1, order).transpose(1, 2).flatten(1, 2)
    return torch.cat([x[:, :start], vision, x[:, start + num_vision :]], dim=1)


def _arrow(num_vision: int, num_text: int, window: int, text_first: bool) -> Arrow:
    if num_vision < 1 or num_text < 0:
        raise ValueError(f"num_vision = {num_vision}, num_text = {num_text}: at least 1 and at least 0")
    if window == 0 or window < -1:
        raise ValueError(f"window = {window} is not valid: a half width above 0, or -1 for full attention")
    return Arrow(num_vision, num_text, int(window), text_first)
