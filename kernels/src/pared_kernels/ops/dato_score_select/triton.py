"""Base-token selection in one launch: every program sums its whole sample, then decides its share of the patches."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...philox import KEY_STEPS, MULTIPLIERS, ROUNDS
from .philox import NOISE_MEAN, NOISE_SCALE

PHILOX_ROUNDS = tl.constexpr(ROUNDS)
MULTIPLIER_0 = tl.constexpr(MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(MULTIPLIERS[1])
KEY_STEP_0 = tl.constexpr(KEY_STEPS[0])
KEY_STEP_1 = tl.constexpr(KEY_STEPS[1])
MEAN = tl.constexpr(NOISE_MEAN)
SCALE = tl.constexpr(NOISE_SCALE)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    m0 = tl.zeros_like(c0) + MULTIPLIER_0
    m1 = tl.zeros_like(c0) + MULTIPLIER_1
    for _ in tl.static_range(PHILOX_ROUNDS):
        low0 = c0 * m0
        low1 = c2 * m1
        high0 = tl.umulhi(c0, m0)
        high1 = tl.umulhi(c2, m1)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + KEY_STEP_0
        k1 = k1 + KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def halves(bits):
    return ((bits & 0xFFFF) + (bits >> 16)).to(tl.int32)


@triton.jit
def noise(token, sample, call, block, seed_low, seed_high):
    """Standardised sum of 16 uniform 16-bit integers, the same bits as `philox.noise`."""
    zero = tl.zeros_like(token).to(tl.uint32)
    total = tl.zeros_like(token)
    k0 = zero + seed_low.to(tl.uint32)
    k1 = zero + seed_high.to(tl.uint32)
    for part in tl.static_range(2):
        word = (2 * token + part).to(tl.uint32)
        c0, c1, c2, c3 = philox(
            word, zero + sample.to(tl.uint32), zero + block.to(tl.uint32), zero + call.to(tl.uint32), k0, k1
        )
        total += halves(c0) + halves(c1) + halves(c2) + halves(c3)
    return (total - MEAN).to(tl.float32) * SCALE


@triton.jit
def dynamics(
    current_ptr,
    previous_ptr,
    sample,
    y,
    x,
    mask,
    height,
    width,
    CHANNELS: tl.constexpr,
    FY: tl.constexpr,
    FX: tl.constexpr,
):
    """Mean |current - previous| over channels and pixels of the tokens (y, x), 0 where not finite."""
    total = tl.zeros_like(y).to(tl.float32)
    for channel in range(CHANNELS):
        plane = (sample.to(tl.int64) * CHANNELS + channel) * height
        for part in tl.static_range(FY * FX):
            offset = (plane + y * FY + part // FX) * width + x * FX + part % FX
            now = tl.load(current_ptr + offset, mask, other=0.0).to(tl.float32)
            before = tl.load(previous_ptr + offset, mask, other=0.0).to(tl.float32)
            total += tl.abs(now - before)
    mean = total / (CHANNELS * FY * FX)
    return tl.where(mean < float("inf"), mean, 0.0)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "call", "block"])
def score_select_kernel(
    current_ptr,
    previous_ptr,
    out_ptr,
    height,
    width,
    grid_height,
    grid_width,
    patch_rows,
    patch_columns,
    groups,
    gamma,
    alpha,
    seed_low,
    seed_high,
    call,
    block,
    CHANNELS: tl.constexpr,
    FY: tl.constexpr,
    FX: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    HAS_SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
):
    sample = tl.program_id(1)
    deciding = tl.num_programs(1)
    patches = patch_rows * patch_columns
    scale = gamma
    if HAS_SCORE and NORMALIZE:
        tokens = grid_height * grid_width
        partial = tl.zeros((BLOCK_TOKENS,), tl.float32)
        for start in range(0, tokens, BLOCK_TOKENS):
            token = start + tl.arange(0, BLOCK_TOKENS)
            y = token // grid_width
            x = token % grid_width
            partial += dynamics(
                current_ptr, previous_ptr, sample, y, x, token < tokens, height, width, CHANNELS, FY, FX
            )
        mean = tl.sum(partial, axis=0) / tokens
        scale = tl.where(mean > 0, gamma / tl.where(mean > 0, mean, 1.0), 0.0)
    patch = tl.program_id(0) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    mask = patch < patches
    top = (patch // patch_columns) * PATCH_HEIGHT
    left = (patch % patch_columns) * PATCH_WIDTH
    best = tl.full((BLOCK_PATCHES,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK_PATCHES,), tl.int32)
    for offset in range(PATCH_HEIGHT * PATCH_WIDTH):
        y = top + offset // PATCH_WIDTH
        x = left + offset % PATCH_WIDTH
        token = y * grid_width + x
        score = tl.zeros((BLOCK_PATCHES,), tl.float32)
        if HAS_SCORE:
            score += scale * dynamics(current_ptr, previous_ptr, sample, y, x, mask, height, width, CHANNELS, FY, FX)
        if HAS_NOISE:
            score += alpha * noise(token, sample, call, block, seed_low, seed_high)
        # Strictly greater: equal scores go to the first token of the patch.
        better = score > best
        best = tl.where(better, score, best)
        where = tl.where(better, token, where)
    for group in range(groups):
        row = (group * deciding + sample).to(tl.int64) * patches
        tl.store(out_ptr + row + patch, where.to(tl.int64), mask)


def constants(
    channels: int,
    pixels: tuple[int, int],
    patch: tuple[int, int],
    has_score: bool,
    normalize: bool,
    has_noise: bool,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the kernel's constants and launch options; `pixels` is (height, width) of a token."""
    chosen = {
        "CHANNELS": channels,
        "FY": pixels[0],
        "FX": pixels[1],
        "PATCH_HEIGHT": patch[0],
        "PATCH_WIDTH": patch[1],
        "HAS_SCORE": has_score,
        "NORMALIZE": normalize,
        "HAS_NOISE": has_noise,
        "BLOCK_TOKENS": 1024,
        "BLOCK_PATCHES": 128,
    }
    return chosen, {"num_warps": 4, "enable_fp_fusion": True}


def unsupported(current: Tensor, *rest: Any) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    return "float64 is left to the reference" if current.element_size() == 8 else None


def dato_score_select(
    current: Tensor,
    previous: Tensor | None,
    grid_height: int,
    grid_width: int,
    patch_height: int,
    patch_width: int,
    gamma: float,
    alpha: float,
    normalize: bool,
    seed: int,
    call: int,
    block: int,
    groups: int,
) -> Tensor:
    """Return what `pared_kernels.dato_score_select` does; `groups` divides the batch."""
    batch, channels, height, width = current.shape
    rows, columns = grid_height // patch_height, grid_width // patch_width
    out = current.new_empty((batch, rows * columns), dtype=torch.int64)
    if out.numel() == 0:
        return out
    chosen, options = constants(
        channels,
        (height // grid_height, width // grid_width),
        (patch_height, patch_width),
        previous is not None,
        normalize,
        alpha != 0,
    )
    current = current.contiguous()
    score_select_kernel[(triton.cdiv(rows * columns, chosen["BLOCK_PATCHES"]), batch // groups)](
        current,
        current if previous is None else previous.contiguous(),
        out,
        height,
        width,
        grid_height,
        grid_width,
        rows,
        columns,
        groups,
        float(gamma),
        float(alpha),
        _signed(seed),
        _signed(seed >> 32),
        call,
        block,
        **chosen,
        **options,
    )
    return out


def _signed(word: int) -> int:
    # A 32-bit word as int32, so that its type, and with it the compiled kernel, does not depend on its value.
    return ((word + 2**31) & 0xFFFFFFFF) - 2**31
