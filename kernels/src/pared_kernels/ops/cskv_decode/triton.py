"""Split-K flash decoding over latents: keys are rebuilt tile by tile, values are summed as latents."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch

LARGEST_RANK = 1024
"""Ranks of values above this need more registers for the latent sums than a block has."""

LARGEST_RANK_ROCM = 512
"""The same on AMD's GPUs in float32, and on those with wavefronts of 32 in every dtype."""

LOG2_E = 1.4426950408889634


VARYING = [
    *("old", "recent", "k_quantised", "v_quantised", "splits", "split_tokens"),
    *("c_k_rows", "c_v_rows", "rotary_rows", "k_codes_rows", "k_scale_rows", "v_codes_rows", "v_scale_rows"),
]
"""Arguments that change from step to step, or from one cache to another; what is multiplied by them is constant."""


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def latent_tile(
    raw_ptr,
    codes_ptr,
    scale_ptr,
    offset_ptr,
    first,
    place,
    channel,
    mask,
    quantised,
    RANK: tl.constexpr,
    ROW: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_RUN_OVER_TOKENS: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """Latents of the tokens first + place and these channels; those below `quantised` are unpacked from codes."""
    if BITS == 0:
        value = tl.load(raw_ptr + tl.cast(first, tl.int64) * ROW + (place * ROW + channel), mask, other=0.0)
    else:
        PER_BYTE: tl.constexpr = 8 // BITS
        BYTES: tl.constexpr = (RANK + PER_BYTE - 1) // PER_BYTE
        token = first + place
        at = tl.cast(first - quantised, tl.int64) * ROW + (place * ROW + channel)
        raw = tl.load(raw_ptr + at, mask & (token >= quantised), other=0.0)
        packed = mask & (token < quantised)
        at = tl.cast(first, tl.int64) * BYTES + (place * BYTES + channel // PER_BYTE)
        byte = tl.load(codes_ptr + at, packed, other=0).to(tl.int32)
        code = ((byte >> (channel % PER_BYTE * BITS)) & (2**BITS - 1)).to(tl.float32)
        if GROUPS_RUN_OVER_TOKENS:
            group = token // GROUP * RANK + channel
        else:
            group = token * (RANK // GROUP) + channel // GROUP
        scale = tl.load(scale_ptr + group, packed, other=0.0).to(tl.float32)
        offset = tl.load(offset_ptr + group, packed, other=0.0).to(tl.float32)
        exact = (code - offset) * scale if CLAMPED else code * scale + offset
        value = tl.where(token < quantised, exact.to(raw.dtype), raw)
    return value


@triton.jit
def softmax_step(scores, largest, total):
    """Return weights of the tile, what earlier sums are to be multiplied by, and the new maximum and total."""
    new = tl.maximum(largest, tl.max(scores, axis=1))
    # A row that has met masked tokens alone has no maximum yet.
    anchor = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - anchor[:, None])
    rescale = tl.exp2(largest - anchor)
    return weights, rescale, new, total * rescale + tl.sum(weights, axis=1)


@triton.jit
def attend_recent(
    q_rows,
    keys_ptr,
    values_ptr,
    out_rows,
    row,
    is_row,
    recent,
    begin_valid,
    scale,
    stride_k_head,
    stride_k_token,
    stride_v_head,
    stride_v_token,
    largest,
    total,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_RECENT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend to exact keys and values, store their weighted sums, and return maximum and total of each row."""
    dim = tl.arange(0, BLOCK_DIM)
    is_dim = dim < HEAD_DIM
    exact = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
    for first in range(0, recent, BLOCK_RECENT):
        token = first + tl.arange(0, BLOCK_RECENT)
        is_token = token < recent
        mask = is_token[:, None] & is_dim[None, :]
        scores = tl.zeros((ROWS, BLOCK_RECENT), tl.float32)
        for head in range(HEADS):
            keys = keys_ptr + head * stride_k_head + token[:, None] * stride_k_token
            k = tl.load(keys + dim[None, :], mask, other=0.0)
            # Rows of other key heads are zero here, so the sum over heads gives each row the scores of its own.
            is_own = is_row & (row // GROUP == head)
            q = tl.load(q_rows + dim[None, :], is_own[:, None] & is_dim[None, :], other=0.0)
            scores = product(q, tl.trans(k), scores, PRECISION, WIDEN)
        scores = tl.where((is_token & (token >= begin_valid))[None, :], scores * scale, float("-inf"))
        weights, rescale, largest, total = softmax_step(scores, largest, total)
        exact = exact * rescale[:, None]
        for head in range(HEADS):
            values = values_ptr + head * stride_v_head + token[:, None] * stride_v_token
            v = tl.load(values + dim[None, :], mask, other=0.0)
            own = tl.where((row // GROUP == head)[:, None], weights, 0.0)
            exact = product(own.to(v.dtype), v, exact, PRECISION, WIDEN)
    tl.store(out_rows + dim[None, :], exact, is_row[:, None] & is_dim[None, :])
    return largest, total


@triton.jit(do_not_specialize=VARYING)
def split_kernel(
    q_ptr,
    c_k_ptr,
    c_v_ptr,
    b_k_ptr,
    bias_k_ptr,
    k_tail_ptr,
    v_tail_ptr,
    cos_ptr,
    sin_ptr,
    start_ptr,
    k_codes_ptr,
    k_scale_ptr,
    k_offset_ptr,
    v_codes_ptr,
    v_scale_ptr,
    v_offset_ptr,
    latent_ptr,
    exact_ptr,
    largest_ptr,
    total_ptr,
    old,
    recent,
    k_quantised,
    v_quantised,
    splits,
    split_tokens,
    scale,
    c_k_rows,
    c_v_rows,
    rotary_rows,
    k_codes_rows,
    k_scale_rows,
    v_codes_rows,
    v_scale_rows,
    stride_k_batch,
    stride_k_head,
    stride_k_token,
    stride_v_batch,
    stride_v_head,
    stride_v_token,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_PAIRS: tl.constexpr,
    RANK_K: tl.constexpr,
    RANK_V: tl.constexpr,
    ROW_K: tl.constexpr,
    ROW_V: tl.constexpr,
    ROW_ROTARY: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    CLAMPED: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_RECENT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    split = tl.program_id(0)
    head_block = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    # The query heads of HEADS key heads share one tile: row // GROUP is the key head that a row reads.
    row = tl.arange(0, ROWS)
    is_row = row < HEADS * GROUP
    query = sample * (KV_HEADS * GROUP) + head_block * (HEADS * GROUP) + row
    q_rows = q_ptr + query[:, None] * HEAD_DIM
    begin_valid = tl.load(start_ptr + sample).to(tl.int32) if HAS_START else 0
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if split < splits:
        c_k_ptr += sample * c_k_rows * ROW_K
        c_v_ptr += sample * c_v_rows * ROW_V
        cos_ptr += sample * rotary_rows * ROW_ROTARY
        sin_ptr += sample * rotary_rows * ROW_ROTARY
        if K_BITS > 0:
            k_codes_ptr += sample * k_codes_rows * ((RANK_K * K_BITS + 7) // 8)
            k_scale_ptr += sample * k_scale_rows * RANK_K
            k_offset_ptr += sample * k_scale_rows * RANK_K
        if V_BITS > 0:
            v_codes_ptr += sample * v_codes_rows * ((RANK_V * V_BITS + 7) // 8)
            v_scale_ptr += sample * v_scale_rows * (RANK_V // V_GROUP)
            v_offset_ptr += sample * v_scale_rows * (RANK_V // V_GROUP)
        # Channels in pairs: first those that are turned together, then the rest, which is turned by nothing.
        pair = tl.arange(0, BLOCK_PAIRS)
        turned = pair < ROTARY_PAIRS
        is_pair = pair < HEAD_DIM // 2
        if ROTARY_PAIRS == 0 or 2 * ROTARY_PAIRS == HEAD_DIM:
            left = pair
            right = pair + HEAD_DIM // 2
        else:
            left = tl.where(turned, pair, pair + ROTARY_PAIRS)
            right = left + tl.where(turned, ROTARY_PAIRS, HEAD_DIM // 2 - ROTARY_PAIRS)
        place = tl.arange(0, BLOCK_TOKENS)
        value_channel = tl.arange(0, BLOCK_VALUES)
        latent = tl.zeros((ROWS, BLOCK_VALUES), tl.float32)
        end = tl.minimum(old, (split + 1) * split_tokens)
        begin = tl.maximum(split * split_tokens, begin_valid // BLOCK_TOKENS * BLOCK_TOKENS)
        for first in range(begin, end, BLOCK_TOKENS):
            is_token = first + place < end
            scores = tl.zeros((ROWS, BLOCK_TOKENS), tl.float32)
            for head in range(HEADS):
                kv_head = head_block * HEADS + head
                b_rows = b_k_ptr + kv_head * (HEAD_DIM * RANK_K)
                key_left = tl.zeros((BLOCK_TOKENS, BLOCK_PAIRS), tl.float32)
                key_right = tl.zeros((BLOCK_TOKENS, BLOCK_PAIRS), tl.float32)
                for rank in range(0, RANK_K, BLOCK_RANK):
                    channel = rank + tl.arange(0, BLOCK_RANK)
                    is_channel = channel < RANK_K
                    c = latent_tile(
                        c_k_ptr,
                        k_codes_ptr,
                        k_scale_ptr,
                        k_offset_ptr,
                        first,
                        place[:, None],
                        channel[None, :],
                        is_token[:, None] & is_channel[None, :],
                        k_quantised,
                        RANK_K,
                        ROW_K,
                        K_BITS,
                        K_GROUP,
                        True,
                        CLAMPED,
                    )
                    mask = is_channel[:, None] & is_pair[None, :]
                    b_left = tl.load(b_rows + left[None, :] * RANK_K + channel[:, None], mask, other=0.0)
                    b_right = tl.load(b_rows + right[None, :] * RANK_K + channel[:, None], mask, other=0.0)
                    key_left = product(c, b_left, key_left, PRECISION, WIDEN)
                    key_right = product(c, b_right, key_right, PRECISION, WIDEN)
                if HAS_BIAS:
                    bias = bias_k_ptr + kv_head * HEAD_DIM
                    key_left += tl.load(bias + left, is_pair, other=0.0).to(tl.float32)[None, :]
                    key_right += tl.load(bias + right, is_pair, other=0.0).to(tl.float32)[None, :]
                if ROTARY_PAIRS > 0:
                    at = tl.cast(first, tl.int64) * ROW_ROTARY + (place[:, None] * ROW_ROTARY + pair[None, :])
                    mask = is_token[:, None] & turned[None, :]
                    cos = tl.load(cos_ptr + at, mask, other=1.0).to(tl.float32)
                    sin = tl.load(sin_ptr + at, mask, other=0.0).to(tl.float32)
                    unturned = key_left
                    key_left = key_left * cos - key_right * sin
                    key_right = key_right * cos + unturned * sin
                # Rows of other key heads are zero here, so the sum over heads gives each row the scores of its own.
                mask = (is_row & (row // GROUP == head))[:, None] & is_pair[None, :]
                q_left = tl.load(q_rows + left[None, :], mask, other=0.0)
                q_right = tl.load(q_rows + right[None, :], mask, other=0.0)
                scores = product(q_left, tl.trans(key_left.to(q_left.dtype)), scores, PRECISION, WIDEN)
                scores = product(q_right, tl.trans(key_right.to(q_left.dtype)), scores, PRECISION, WIDEN)
            attended = is_token & (first + place >= begin_valid)
            scores = tl.where(attended[None, :], scores * scale, float("-inf"))
            weights, rescale, largest, total = softmax_step(scores, largest, total)
            c = latent_tile(
                c_v_ptr,
                v_codes_ptr,
                v_scale_ptr,
                v_offset_ptr,
                first,
                place[:, None],
                value_channel[None, :],
                is_token[:, None] & (value_channel < RANK_V)[None, :],
                v_quantised,
                RANK_V,
                ROW_V,
                V_BITS,
                V_GROUP,
                False,
                CLAMPED,
            )
            latent = product(weights.to(c.dtype), c, latent * rescale[:, None], PRECISION, WIDEN)
        at = (query * splits + split)[:, None] * RANK_V + value_channel[None, :]
        tl.store(latent_ptr + at, latent, is_row[:, None] & (value_channel < RANK_V)[None, :])
    else:
        # The last program of a row of blocks attends to the recent tokens.
        largest, total = attend_recent(
            q_rows,
            k_tail_ptr + sample * stride_k_batch + head_block * HEADS * stride_k_head,
            v_tail_ptr + sample * stride_v_batch + head_block * HEADS * stride_v_head,
            exact_ptr + query[:, None] * HEAD_DIM,
            row,
            is_row,
            recent,
            begin_valid - old,
            scale,
            stride_k_head,
            stride_k_token,
            stride_v_head,
            stride_v_token,
            largest,
            total,
            GROUP,
            HEADS,
            HEAD_DIM,
            ROWS,
            BLOCK_DIM,
            BLOCK_RECENT,
            PRECISION,
            WIDEN,
        )
    at = query * (splits + 1) + split
    tl.store(largest_ptr + at, largest, is_row)
    tl.store(total_ptr + at, total, is_row)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    latent_ptr,
    exact_ptr,
    largest_ptr,
    total_ptr,
    b_v_ptr,
    bias_v_ptr,
    out_ptr,
    splits,
    QUERY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    kv_head = (query % QUERY_HEADS) // GROUP
    dim = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    is_dim = dim < HEAD_DIM
    piece = tl.arange(0, BLOCK_SPLITS)
    largest_ptr += query * (splits + 1)
    total_ptr += query * (splits + 1)
    top = tl.load(largest_ptr + splits)
    for first in range(0, splits, BLOCK_SPLITS):
        largest = tl.load(largest_ptr + first + piece, first + piece < splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(largest, axis=0))
    weight = tl.exp2(tl.load(largest_ptr + splits) - top)
    recent_total = weight * tl.load(total_ptr + splits)
    out = weight * tl.load(exact_ptr + query * HEAD_DIM + dim, is_dim, other=0.0)
    old_total = 0.0
    for rank in range(0, RANK_V, BLOCK_RANK):
        channel = rank + tl.arange(0, BLOCK_RANK)
        is_channel = channel < RANK_V
        latent = tl.zeros((BLOCK_RANK,), tl.float32)
        old_total = 0.0
        for first in range(0, splits, BLOCK_SPLITS):
            is_split = first + piece < splits
            largest = tl.load(largest_ptr + first + piece, is_split, other=float("-inf"))
            weights = tl.exp2(largest - top)
            old_total += tl.sum(weights * tl.load(total_ptr + first + piece, is_split, other=0.0), axis=0)
            at = (query * splits + first + piece)[:, None] * RANK_V + channel[None, :]
            part = tl.load(latent_ptr + at, is_split[:, None] & is_channel[None, :], other=0.0)
            latent += tl.sum(weights[:, None] * part, axis=0)
        b = b_v_ptr + (kv_head * HEAD_DIM + dim[:, None]) * RANK_V + channel[None, :]
        b = tl.load(b, is_dim[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        out += tl.sum(b * latent[None, :], axis=1)
    if HAS_BIAS:
        out += old_total * tl.load(bias_v_ptr + kv_head * HEAD_DIM + dim, is_dim, other=0.0).to(tl.float32)
    out = out / (old_total + recent_total)
    tl.store(out_ptr + query * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), is_dim)


def split_constants(
    dtype: torch.dtype,
    *,
    heads: int,
    group: int,
    head_dim: int,
    rotary_pairs: int,
    rank_k: int,
    rank_v: int,
    packed: bool,
    wavefront: int | None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the constants of `split_kernel` that follow from the shapes, and its launch options.

    `wavefront`: threads of a wavefront of an AMD GPU, 32 or 64; None for other GPUs.
    """
    full = dtype == torch.float32
    together = 1
    while 2 * together * group <= 16 and heads % (2 * together) == 0:
        together *= 2
    values = max(16, triton.next_power_of_2(rank_v))
    # A tile of values and a tile of rebuilt keys must each fit into 64 KiB of shared memory and into registers.
    if full:
        tokens = min(32, 8192 // values)
    else:
        largest = 64 if wavefront == 64 and not packed else 32
        tokens = min(largest, (16384 if wavefront else 32768) // values, 8192 // head_dim)
    tokens = max(16, tokens)
    # Small steps where large ones would multiply many zeros, save for odd ranks, which spill in small steps.
    large = (rank_k - 1) % 64 >= 32 or rank_k % 2 == 1
    step = 64 if large and not full and wavefront is None else 32
    constants = {
        "KV_HEADS": heads,
        "GROUP": group,
        "HEADS": together,
        "HEAD_DIM": head_dim,
        "ROTARY_PAIRS": rotary_pairs,
        "RANK_K": rank_k,
        "RANK_V": rank_v,
        "ROWS": max(16, triton.next_power_of_2(together * group)),
        "BLOCK_TOKENS": tokens,
        "BLOCK_PAIRS": max(16, triton.next_power_of_2(head_dim // 2)),
        "BLOCK_RANK": step if rank_k > 16 or wavefront else 16,
        "BLOCK_VALUES": values,
        "BLOCK_DIM": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_RECENT": 32,
        # TF32 products would round keys to 10 bits.
        "PRECISION": "ieee",
        # Triton's interpreter multiplies the bit patterns of bfloat16.
        "WIDEN": dtype == torch.bfloat16 and dispatch.interprets(),
    }
    # Eight wavefronts of 64 would leave each thread half of the 512 registers that it can have.
    warps = 4 if wavefront == 64 else 8
    return constants, {"num_warps": warps, "num_stages": 2 if wavefront else 3, "enable_fp_fusion": True}


def combine_constants(
    *, query_heads: int, group: int, head_dim: int, rank_v: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the constants of `combine_kernel` that follow from the shapes, and its launch options."""
    constants = {
        "QUERY_HEADS": query_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "RANK_V": rank_v,
        "BLOCK_DIM": 32,
        "BLOCK_RANK": 64,
        "BLOCK_SPLITS": 16,
    }
    return constants, {"num_warps": 4, "enable_fp_fusion": True}


def too_large(
    dtype: torch.dtype,
    *,
    group: int,
    head_dim: int,
    rank_v: int,
    rows: tuple[int, int],
    packed: bool,
    wavefront: int | None,
) -> str | None:
    """Return why a GPU cannot hold a tile in registers and shared memory, or None; `rows`: strides of the latents."""
    small = wavefront == 32 or (wavefront == 64 and dtype == torch.float32)
    largest = LARGEST_RANK_ROCM if small else LARGEST_RANK
    if rank_v > largest:
        return f"values have rank {rank_v}; the kernel sums up to {largest} channels"
    if wavefront != 32:
        return None
    # A thread has 256 registers there; the code for these shapes spills some of them.
    kind = None
    if packed or dtype == torch.float32 or head_dim > 128:
        kind = "codes, float32 and heads of over 128 channels"
    elif group > 8:
        kind = "over 8 query heads of one key head"
    elif rank_v > 128 and any(row % 2 for row in rows):
        kind = "rows of an odd number of latents over 128"
    return None if kind is None else f"{kind} take too many registers of AMD GPUs with wavefronts of 32"


def unsupported(q: Tensor, c_k: Tensor, c_v: Tensor, *rest: Any) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    head_dim = q.shape[3]
    if q.dtype == torch.float64:
        return "float64 is left to the reference"
    if head_dim % 2:
        return f"heads of {head_dim} channels do not consist of pairs"
    return too_large(
        q.dtype,
        group=q.shape[1] // rest[2].shape[1],
        head_dim=head_dim,
        rank_v=c_v.shape[2],
        rows=(c_k.stride(1), c_v.stride(1)),
        packed=any(codes is not None for codes in (rest[10], rest[13])),
        wavefront=_wavefront(q.device),
    )


def cskv_decode(
    q: Tensor,
    c_k: Tensor,
    c_v: Tensor,
    b_k: Tensor,
    b_v: Tensor,
    k_tail: Tensor,
    v_tail: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    start: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    k_codes: Tensor | None,
    k_scale: Tensor | None,
    k_offset: Tensor | None,
    v_codes: Tensor | None,
    v_scale: Tensor | None,
    v_offset: Tensor | None,
    k_bits: int,
    v_bits: int,
    k_group: int,
    v_group: int,
    clamped: bool,
) -> Tensor:
    """Return what `pared_kernels.cskv_decode` does."""
    batch, query_heads, _, head_dim = q.shape
    heads, recent = k_tail.shape[1:3]
    rank_k, rank_v = c_k.shape[2], c_v.shape[2]
    k_quantised = 0 if k_codes is None else k_codes.shape[1]
    v_quantised = 0 if v_codes is None else v_codes.shape[1]
    old = k_quantised + c_k.shape[1]
    constants, options = split_constants(
        q.dtype,
        heads=heads,
        group=query_heads // heads,
        head_dim=head_dim,
        rotary_pairs=0 if cos is None else cos.shape[2],
        rank_k=rank_k,
        rank_v=rank_v,
        packed=k_bits + v_bits > 0,
        wavefront=_wavefront(q.device),
    )
    blocks = heads // constants["HEADS"]
    splits, split_tokens = _split(old, constants["BLOCK_TOKENS"], batch * blocks, q.device)
    latent, exact = (
        q.new_empty(shape, dtype=torch.float32) for shape in ((batch, query_heads, splits, rank_v), q.shape)
    )
    largest, total = (q.new_empty((batch, query_heads, splits + 1), dtype=torch.float32) for _ in range(2))
    c_k, c_k_rows = _rows(c_k)
    c_v, c_v_rows = _rows(c_v)
    cos, rotary_rows = (None, 0) if cos is None else _rows(cos)
    sin, sin_rows = (None, 0) if sin is None else _rows(sin)
    if cos is not None and sin is not None and (sin_rows, sin.stride(1)) != (rotary_rows, cos.stride(1)):
        (cos, rotary_rows), (sin, _) = _rows(cos.contiguous()), _rows(sin.contiguous())
    k_codes, k_codes_rows = _whole_rows(k_codes)
    v_codes, v_codes_rows = _whole_rows(v_codes)
    (k_scale, k_scale_rows), (k_offset, k_offset_rows) = _whole_rows(k_scale), _whole_rows(k_offset)
    (v_scale, v_scale_rows), (v_offset, v_offset_rows) = _whole_rows(v_scale), _whole_rows(v_offset)
    if (k_scale_rows, v_scale_rows) != (k_offset_rows, v_offset_rows):
        k_scale, k_offset, v_scale, v_offset = (
            None if one is None else one.contiguous() for one in (k_scale, k_offset, v_scale, v_offset)
        )
        k_scale_rows, v_scale_rows = _whole_rows(k_scale)[1], _whole_rows(v_scale)[1]
    k_tail, v_tail = (tail if tail.stride(3) == 1 else tail.contiguous() for tail in (k_tail, v_tail))
    q, b_k, b_v = q.contiguous(), b_k.contiguous(), b_v.contiguous()
    split_kernel[(splits + 1, blocks, batch)](
        q,
        c_k,
        c_v,
        b_k,
        q if bias_k is None else bias_k.contiguous(),
        k_tail,
        v_tail,
        q if cos is None else cos,
        q if sin is None else sin,
        q if start is None else start.contiguous(),
        *(q if one is None else one for one in (k_codes, k_scale, k_offset, v_codes, v_scale, v_offset)),
        latent,
        exact,
        largest,
        total,
        old,
        recent,
        k_quantised,
        v_quantised,
        splits,
        split_tokens,
        scale * LOG2_E,
        c_k_rows,
        c_v_rows,
        rotary_rows,
        k_codes_rows,
        k_scale_rows,
        v_codes_rows,
        v_scale_rows,
        *k_tail.stride()[:3],
        *v_tail.stride()[:3],
        ROW_K=c_k.stride(1),
        ROW_V=c_v.stride(1),
        ROW_ROTARY=0 if cos is None else cos.stride(1),
        K_BITS=k_bits,
        V_BITS=v_bits,
        K_GROUP=k_group,
        V_GROUP=v_group,
        CLAMPED=clamped,
        HAS_START=start is not None,
        HAS_BIAS=bias_k is not None,
        **constants,
        **options,
    )
    out = torch.empty_like(q)
    constants, options = combine_constants(
        query_heads=query_heads, group=query_heads // heads, head_dim=head_dim, rank_v=rank_v
    )
    combine_kernel[(batch * query_heads, triton.cdiv(head_dim, constants["BLOCK_DIM"]))](
        latent,
        exact,
        largest,
        total,
        b_v,
        q if bias_v is None else bias_v.contiguous(),
        out,
        splits,
        HAS_BIAS=bias_v is not None,
        **constants,
        **options,
    )
    return out


def _wavefront(device: torch.device) -> int | None:
    """Return the threads of a wavefront of an AMD GPU, None for other devices."""
    if torch.version.hip is None or device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).warp_size)


def _split(old: int, block: int, others: int, device: torch.device) -> tuple[int, int]:
    """Return how many programs share the old tokens of a row, and the tokens of each: two programs a processor."""
    if old == 0:
        return 0, block
    # On the CPU, in the interpreter, enough of them to have something to merge.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    tiles = triton.cdiv(old, block)
    wanted = min(tiles, max(1, 2 * processors // others))
    tokens = triton.cdiv(tiles, wanted) * block
    return triton.cdiv(old, tokens), tokens


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Return (batch, rows, channels) and how many rows lie between samples; a copy where that is not a whole number.

    Counted in rows of constant width, an offset is known to be a multiple of it, and rows of 200 channels are still
    read 16 bytes at a time.
    """
    if tensor.stride(2) != 1 or tensor.stride(1) < tensor.shape[2] or tensor.stride(0) % tensor.stride(1):
        tensor = tensor.contiguous()
    return tensor, 0 if tensor.shape[0] == 1 else tensor.stride(0) // max(tensor.stride(1), 1)


def _whole_rows(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """As `_rows`, for rows without gaps."""
    if tensor is None:
        return None, 0
    return _rows(tensor if tensor.stride(1) == tensor.shape[2] else tensor.contiguous())
