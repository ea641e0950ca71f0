"""Packed linear layer on a GPU, in three ways by the number M of rows of x.

M = 1: a matrix-vector product that unpacks in registers. Up to `TILED`: tiles of tensor-core products with codes that
are unpacked in registers. Above: the weight is dequantised once into a scratch buffer and a library multiplies, since
unpacking again for every tile of rows would cost more than it saves.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import dispatch
from .reference import zero_points

TILED = 256
# Programs that fill any of the targets; fewer are split along K.
PROGRAMS = 264


@triton.jit
def gemv_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    groups,
    steps,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PERIODS: tl.constexpr,
):
    """One row of x. A period is 32 codes, in BITS words: each shift of each word is a constant."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    periods = columns // 32
    base = packed_ptr + row.to(tl.int64)[:, None] * (periods * BITS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_PERIODS), tl.float32)
    first = tl.program_id(1) * steps
    for step in range(first, first + steps):
        period = step * BLOCK_PERIODS + tl.arange(0, BLOCK_PERIODS)
        valid = is_row[:, None] & (period < periods)[None, :]
        product = tl.zeros((BLOCK_ROWS, BLOCK_PERIODS), tl.float32)
        x_sum = tl.zeros((BLOCK_PERIODS,), tl.float32)
        for place in tl.static_range(32):
            word = place * BITS // 32
            shift = place * BITS % 32
            # Words of a period are read again from registers: the compiler merges equal loads.
            bits = tl.load(base + (period * BITS + word)[None, :], mask=valid, other=0)
            code = (bits >> shift) & (2**BITS - 1)
            if shift + BITS > 32:
                high = tl.load(base + (period * BITS + word + 1)[None, :], mask=valid, other=0)
                code = ((bits >> shift) & ((1 << (32 - shift)) - 1)) | ((high << (32 - shift)) & (2**BITS - 1))
            x = tl.load(x_ptr + period * 32 + place, mask=period < periods, other=0.0).to(tl.float32)
            product += code.to(tl.float32) * x[None, :]
            x_sum += x
        group = period * 32 // GROUP
        scale = tl.load(scales_ptr + row.to(tl.int64)[:, None] * groups + group[None, :], mask=valid, other=0.0)
        if SYMMETRIC:
            product -= 2 ** (BITS - 1) * x_sum[None, :]
        else:
            zero = tl.load(zeros_ptr + row.to(tl.int64)[:, None] * groups + group[None, :], mask=valid, other=0)
            product -= zero.to(tl.float32) * x_sum[None, :]
        total += product * scale.to(tl.float32)
    result = tl.sum(total, axis=1)
    if BIAS:
        result += tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * rows + row, result.to(out_ptr.dtype.element_ty), mask=is_row)


@triton.jit
def gemm_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    many,
    rows,
    columns,
    groups,
    steps,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of outputs. BLOCK_K divides GROUP: the centred codes are exact, and the scale multiplies their product."""
    index = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_x = index < many
    is_row = row < rows
    words = columns // 32 * BITS
    base = packed_ptr + row.to(tl.int64)[None, :] * words
    x_rows = x_ptr + index.to(tl.int64)[:, None] * columns
    total = tl.zeros((BLOCK_X, BLOCK_ROWS), tl.float32)
    first = tl.program_id(2) * steps
    for step in range(first, tl.minimum(first + steps, columns // BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=is_x[:, None], other=0.0)
        start = k * BITS
        word = start >> 5
        shift = start & 31
        # Where a code ends within its word, the second load finds the same word and adds nothing below the mask.
        after = (start + BITS - 1) >> 5
        low = tl.load(base + word[:, None], mask=is_row[None, :], other=0).to(tl.uint32, bitcast=True)
        high = tl.load(base + after[:, None], mask=is_row[None, :], other=0).to(tl.uint32, bitcast=True)
        wide = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        code = (wide >> shift[:, None].to(tl.uint64)).to(tl.int32) & (2**BITS - 1)
        group = step * BLOCK_K // GROUP
        place = row.to(tl.int64) * groups + group
        scale = tl.load(scales_ptr + place, mask=is_row, other=0.0).to(tl.float32)
        if SYMMETRIC:
            centred = code - 2 ** (BITS - 1)
        else:
            centred = code - tl.load(zeros_ptr + place, mask=is_row, other=0).to(tl.int32)[None, :]
        if WIDEN:
            product = tl.dot(x.to(tl.float32), centred.to(tl.float32), input_precision="ieee")
        else:
            product = tl.dot(x, centred.to(x_ptr.dtype.element_ty), input_precision="ieee")
        total += product * scale[None, :]
    if BIAS:
        total += tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)[None, :]
    place = (tl.program_id(2).to(tl.int64) * many + index.to(tl.int64)[:, None]) * rows + row[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=is_x[:, None] & is_row[None, :])


@triton.jit
def dequantize_kernel(
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    columns,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_k = k < columns
    base = packed_ptr + row * (columns // 32 * BITS)
    start = k * BITS
    low = tl.load(base + (start >> 5), mask=is_k, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(base + ((start + BITS - 1) >> 5), mask=is_k, other=0).to(tl.uint32, bitcast=True)
    wide = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    code = (wide >> (start & 31).to(tl.uint64)).to(tl.int32) & (2**BITS - 1)
    place = row * groups + k // GROUP
    scale = tl.load(scales_ptr + place, mask=is_k, other=0.0).to(tl.float32)
    if SYMMETRIC:
        centred = code - 2 ** (BITS - 1)
    else:
        centred = code - tl.load(zeros_ptr + place, mask=is_k, other=0).to(tl.int32)
    weight = centred.to(tl.float32) * scale
    tl.store(out_ptr + row * columns + k, weight.to(out_ptr.dtype.element_ty), mask=is_k)


def gemv_constants(bits: int, group_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and launch options of `gemv_kernel`."""
    constants = {"BITS": bits, "GROUP": group_size, "BLOCK_ROWS": 8, "BLOCK_PERIODS": 32}
    return constants, {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def gemm_constants(bits: int, group_size: int, many: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and launch options of `gemm_kernel`."""
    block_k = next(size for size in (64, 32) if group_size % size == 0)
    block_x = 16 if many <= 16 else 32 if many <= 32 else 64
    constants = {"BITS": bits, "GROUP": group_size, "BLOCK_X": block_x, "BLOCK_ROWS": 64, "BLOCK_K": block_k}
    return constants, {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def dequantize_constants(bits: int, group_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and launch options of `dequantize_kernel`."""
    constants = {"BITS": bits, "GROUP": group_size, "BLOCK_K": 1024}
    return constants, {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def unsupported(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None,
) -> str | None:
    """float64 is left to the reference."""
    return "it accumulates in float32, and x is float64" if x.dtype == torch.float64 else None


def mbq_linear_w16(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    """Return x W^T + bias as `pared_kernels.mbq_linear_w16` does; sums are taken in one order, run after run."""
    x, packed, scales = x.contiguous(), packed.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    (many, columns), rows = x.shape, packed.shape[0]
    groups = columns // group_size
    offsets = zero_points(zeros, bits, rows)
    symmetric = not isinstance(offsets, Tensor)
    zero_tensor = scales if symmetric else offsets
    if many == 0 or rows == 0:
        return x.new_zeros((many, rows))
    if many > TILED:
        constants, options = dequantize_constants(bits, group_size)
        weight = x.new_empty((rows, columns))
        grid = (rows, triton.cdiv(columns, constants["BLOCK_K"]))
        arguments = (packed, scales, zero_tensor, weight, columns, groups)
        dequantize_kernel[grid](*arguments, SYMMETRIC=symmetric, **constants, **options)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if many == 1:
        constants, options = gemv_constants(bits, group_size)
        blocks = triton.cdiv(rows, constants["BLOCK_ROWS"])
        all_steps = triton.cdiv(columns // 32, constants["BLOCK_PERIODS"])
    else:
        constants, options = gemm_constants(bits, group_size, many)
        blocks = triton.cdiv(rows, constants["BLOCK_ROWS"]) * triton.cdiv(many, constants["BLOCK_X"])
        all_steps = columns // constants["BLOCK_K"]
    steps, split = split_steps(blocks, all_steps)
    whole = split == 1
    # Parts of a sum are added by torch, in one order: atomics would make the result vary.
    out = x.new_empty((split, many, rows), dtype=x.dtype if whole else torch.float32)
    shared = {"SYMMETRIC": symmetric, "BIAS": whole and bias is not None, **constants, **options}
    tensors = (x, packed, scales, zero_tensor, scales if bias is None else bias, out)
    if many == 1:
        gemv_kernel[(blocks, split)](*tensors, rows, columns, groups, steps, **shared)
    else:
        tiles = (triton.cdiv(rows, constants["BLOCK_ROWS"]), triton.cdiv(many, constants["BLOCK_X"]), split)
        widen = dispatch.interprets() and x.dtype == torch.bfloat16
        gemm_kernel[tiles](*tensors, many, rows, columns, groups, steps, WIDEN=widen, **shared)
    if whole:
        return out[0]
    total = out.sum(0)
    return (total if bias is None else total + bias.to(torch.float32)).to(x.dtype)


def split_steps(blocks: int, steps: int) -> tuple[int, int]:
    """Return steps along K of each program, and in how many parts K is split, so that the programs fill a GPU."""
    split = min(max(1, PROGRAMS // blocks), max(1, steps // 2))
    each = triton.cdiv(steps, split)
    return each, triton.cdiv(steps, each)
