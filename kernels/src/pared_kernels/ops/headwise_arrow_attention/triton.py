"""Headwise arrow attention as one flash kernel: only visited blocks are read, and skipped heads are not launched."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import lru_cache
from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from .geometry import SKIP, Arrow, visited_pairs

SMALL_SHARED, LARGE_SHARED = 64 * 1024, 160 * 1024
"""Shared memory that every target has, and from which on more tiles are read ahead."""


@triton.jit
def _tile(
    accumulated,
    largest,
    total,
    q,
    k_ptr,
    v_ptr,
    k_offsets,
    v_offsets,
    start,
    stride_k_token,
    stride_v_token,
    row,
    is_text_row,
    window,
    tokens,
    text_start,
    text_end,
    valid_end,
    scale,
    is_channel,
    TILE_N: tl.constexpr,
    PARTIAL: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_VALID: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    column = start + tl.arange(0, TILE_N)
    # A 64-bit base and 32-bit offsets within the tile: tiles of 64-bit pointers would not fit the registers.
    keys = k_ptr + tl.cast(start, tl.int64) * stride_k_token + k_offsets
    values = v_ptr + tl.cast(start, tl.int64) * stride_v_token + v_offsets
    is_column = column < tokens
    if PARTIAL:
        k = tl.load(keys, is_channel[:, None] & is_column[None, :], other=0.0)
    elif PADDED:
        k = tl.load(keys, is_channel[:, None], other=0.0)
    else:
        k = tl.load(keys)
    if WIDEN:
        k = k.to(tl.float32)
    scores = tl.dot(q, k, input_precision=PRECISION)
    if PARTIAL:
        if HAS_VALID:
            is_column = is_column & ((column < valid_end) | (column >= text_end))
        scores = tl.where(is_column[None, :], scores, float("-inf"))
    if EXACT:
        apart = tl.abs(row[:, None] - column[None, :])
        is_text = (column >= text_start) & (column < text_end)
        keep = (window < 0) | (apart <= window) | is_text_row[:, None] | is_text[None, :]
        scores = tl.where(keep, scores, float("-inf"))
    highest = tl.maximum(largest, tl.max(scores, axis=1) * scale)
    shift = highest
    if PARTIAL or EXACT:
        # A row may have met no key so far.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.math.exp2(scores * scale - shift[:, None])
    fade = tl.math.exp2(largest - shift)
    total = total * fade + tl.sum(weights, axis=1)
    if PARTIAL:
        v = tl.load(values, (column < tokens)[:, None] & is_channel[None, :], other=0.0)
    elif PADDED:
        v = tl.load(values, is_channel[None, :], other=0.0)
    else:
        v = tl.load(values)
    weights = weights.to(v.dtype)
    if WIDEN:
        weights = weights.to(tl.float32)
        v = v.to(tl.float32)
    accumulated = tl.dot(weights, v, accumulated * fade[:, None], input_precision=PRECISION)
    return accumulated, highest, total


@triton.jit
def arrow_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    live_ptr,
    valid_ptr,
    batch_size,
    num_vision,
    num_text,
    heads,
    scale,
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_k_batch,
    stride_k_token,
    stride_k_head,
    stride_v_batch,
    stride_v_token,
    stride_v_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tokens = num_vision + num_text
    PADDED: tl.constexpr = HEAD_DIM != BLOCK_D
    # Rows of text visit everything: they start first, wherever they are.
    tile = tl.program_id(0) if TEXT_FIRST else tl.num_programs(0) - 1 - tl.program_id(0)
    place = tl.program_id(1) // batch_size
    batch = (tl.program_id(1) % batch_size).to(tl.int64)
    head = tl.load(live_ptr + 2 * place).to(tl.int64)
    window = tl.load(live_ptr + 2 * place + 1)

    # The ranges of `geometry.visits`, in column blocks.
    first = tile * TILE_M // BLOCK_M * BLOCK_M
    end = tl.minimum(first + BLOCK_M, tokens)
    columns = tl.cdiv(tokens, BLOCK_N)
    if TEXT_FIRST:
        text_start = 0
        text_block, text_block_end = 0, tl.cdiv(num_text, BLOCK_N)
        band, band_end = text_block_end, columns
        vision_start = num_text
    else:
        text_start = num_vision
        text_block = tl.where(num_text > 0, num_vision // BLOCK_N, columns)
        text_block_end = columns
        band, band_end = 0, text_block
        vision_start = 0
    text_end = text_start + num_text
    touches_text = (num_text > 0) & (first < text_end) & (end > text_start)
    if (window > 0) & (touches_text == 0):
        band = tl.maximum(band, tl.maximum(vision_start, first - window) // BLOCK_N)
        band_end = tl.minimum(band_end, tl.cdiv(tl.minimum(vision_start + num_vision, end + window), BLOCK_N))
    valid_end = text_end
    if HAS_VALID:
        valid_end = text_start + tl.load(valid_ptr + batch).to(tl.int32)

    row = tile * TILE_M + tl.arange(0, TILE_M)
    is_row = row < tokens
    is_text_row = (row >= text_start) & (row < text_end)
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < HEAD_DIM
    own = tl.arange(0, TILE_M)
    q_ptr += batch * stride_q_batch + head * stride_q_head + tl.cast(tile, tl.int64) * TILE_M * stride_q_token
    q_tile = q_ptr + own[:, None] * stride_q_token + channel[None, :]
    q = tl.load(q_tile, is_row[:, None] & is_channel[None, :], other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    k_ptr += batch * stride_k_batch + head * stride_k_head
    v_ptr += batch * stride_v_batch + head * stride_v_head
    other = tl.arange(0, TILE_N)
    k_offsets = channel[:, None] + other[None, :] * stride_k_token
    v_offsets = channel[None, :] + other[:, None] * stride_v_token
    accumulated = tl.zeros((TILE_M, BLOCK_D), tl.float32)
    largest = tl.full((TILE_M,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)

    whole = tokens // TILE_N * TILE_N
    for start in range(band * BLOCK_N, tl.minimum(band_end * BLOCK_N, whole), TILE_N):
        accumulated, largest, total = _tile(
            accumulated,
            largest,
            total,
            q,
            k_ptr,
            v_ptr,
            k_offsets,
            v_offsets,
            start,
            stride_k_token,
            stride_v_token,
            row,
            is_text_row,
            window,
            tokens,
            text_start,
            text_end,
            valid_end,
            scale,
            is_channel,
            TILE_N,
            False,
            EXACT,
            HAS_VALID,
            PADDED,
            PRECISION,
            WIDEN,
        )
    # Tiles that need a mask for every column: those of text, and the last one of a band that reaches the end.
    text_tiles = tl.cdiv(tl.minimum(text_block_end * BLOCK_N, tokens) - text_block * BLOCK_N, TILE_N)
    text_tiles = tl.where(text_block_end > text_block, text_tiles, 0)
    has_tail = (band_end > band) & (band_end * BLOCK_N > whole) & (tokens > whole)
    for number in range(text_tiles + has_tail.to(tl.int32)):
        start = tl.where(number < text_tiles, text_block * BLOCK_N + number * TILE_N, whole)
        accumulated, largest, total = _tile(
            accumulated,
            largest,
            total,
            q,
            k_ptr,
            v_ptr,
            k_offsets,
            v_offsets,
            start,
            stride_k_token,
            stride_v_token,
            row,
            is_text_row,
            window,
            tokens,
            text_start,
            text_end,
            valid_end,
            scale,
            is_channel,
            TILE_N,
            True,
            EXACT,
            HAS_VALID,
            PADDED,
            PRECISION,
            WIDEN,
        )
    # Rows beyond the last token may have met no key.
    result = accumulated / tl.where(total > 0, total, 1.0)[:, None]
    out_ptr += ((batch * tokens + tl.cast(tile, tl.int64) * TILE_M) * heads + head) * HEAD_DIM
    out_tile = out_ptr + own[:, None] * (heads * HEAD_DIM) + channel[None, :]
    tl.store(out_tile, result.to(out_ptr.dtype.element_ty), is_row[:, None] & is_channel[None, :])


def arrow_constants(
    head_dim: int, dtype: torch.dtype, block: tuple[int, int] | None, *, shared: int, wavefront: int | None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the constants of `arrow_kernel` that depend on neither text nor layout, and its launch options.

    `block` None is the exact mask; larger blocks than fit a program are computed in tiles. `shared` is the shared
    memory of a program in bytes, `wavefront` the threads of an AMD wavefront (None: NVIDIA).
    """
    width = max(16, triton.next_power_of_2(head_dim))
    tile_rows, tile_columns, warps = _tiles(width, dtype, shared, wavefront)
    rows, columns = block or (tile_rows, tile_columns)
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": width,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "TILE_M": min(rows, tile_rows),
        "TILE_N": min(columns, tile_columns),
        "EXACT": block is None,
        "PRECISION": "ieee",
        # Triton's interpreter multiplies the bit patterns of bfloat16.
        "WIDEN": dtype == torch.bfloat16 and dispatch.interprets(),
    }
    ahead = 3 if wavefront is None and shared >= LARGE_SHARED else 2
    if constants["TILE_M"] != tile_rows and wavefront != 32:
        # Small tiles want fewer warps, except where they would not fit the registers of four.
        warps = min(warps, 4)
    return constants, {"num_warps": warps, "num_stages": ahead, "enable_fp_fusion": True}


def _tiles(width: int, dtype: torch.dtype, shared: int, wavefront: int | None) -> tuple[int, int, int]:
    """Return queries and keys of the largest tile whose products stay in registers, and its warps."""
    if dtype == torch.float32:
        return 16, 16, 8
    if wavefront == 32:
        return (64, 32, 8) if width <= 64 else (32, 16, 8)
    if wavefront == 64 or width > 128:
        return 64, 32, 4
    return (128, 64, 8) if width <= 64 or shared >= LARGE_SHARED else (128, 32, 8)


def _device_limits(device: torch.device) -> tuple[int, int | None]:
    """Return the bytes of shared memory that a program can have, and the threads of an AMD wavefront or None."""
    if device.type != "cuda":
        return SMALL_SHARED, None
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or SMALL_SHARED
    return shared, properties.warp_size if torch.version.hip is not None else None


@lru_cache(maxsize=8192)
def _live_heads(
    windows: tuple[int, ...], num_vision: int, num_text: int, text_first: bool, device: torch.device
) -> Tensor:
    """Heads that are computed and their windows, int32 (live, 2) on `device`, the most expensive first."""

    def cost(window: int) -> int:
        return visited_pairs(Arrow(num_vision, num_text, window, text_first), None)

    live = [(head, window) for head, window in enumerate(windows) if window != SKIP]
    live.sort(key=lambda one: -cost(one[1]))
    return torch.tensor(live, dtype=torch.int32, device=device)


def unsupported(q: Tensor, *rest: Any) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    if q.dtype == torch.float64:
        return "float64 is left to the reference"
    return f"heads of {q.shape[3]} channels; the kernel takes up to 256" if q.shape[3] > 256 else None


def headwise_arrow_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    windows: list[int],
    num_text: int,
    text_first: bool,
    block_rows: int,
    block_columns: int,
    text_valid: Tensor | None,
    scale: float,
) -> None:
    """Write what `pared_kernels.headwise_arrow_attention` writes."""
    batch, tokens, heads, head_dim = q.shape
    live = _live_heads(tuple(windows), tokens - num_text, num_text, text_first, q.device)
    block = (block_rows, block_columns) if block_rows else None
    shared, wavefront = _device_limits(q.device)
    constants, options = arrow_constants(head_dim, q.dtype, block, shared=shared, wavefront=wavefront)
    # Offsets within a tile have 32 bits, and the channels of a token lie side by side.
    q, k, v = (one if one.stride(3) == 1 and one.stride(1) < 2**22 else one.contiguous() for one in (q, k, v))
    grid = (triton.cdiv(tokens, constants["TILE_M"]), len(live) * batch)
    arrow_kernel[grid](
        q,
        k,
        v,
        out,
        live,
        live if text_valid is None else text_valid,
        batch,
        tokens - num_text,
        num_text,
        heads,
        # exp2 is faster than exp.
        scale * log2(e),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        TEXT_FIRST=text_first,
        HAS_VALID=text_valid is not None,
        **constants,
        **options,
    )
