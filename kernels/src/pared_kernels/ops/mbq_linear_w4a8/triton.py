"""W4A8 on a GPU: one pass that quantises the tokens, then int8 products with weights unpacked in registers."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import SMALLEST


@triton.jit
def quantize_tokens_kernel(x_ptr, codes_ptr, scale_ptr, columns, SMALLEST: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * columns + k, mask=k < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    # Correctly rounded divisions: the codes are those of the reference.
    scale = tl.div_rn(tl.maximum(tl.max(largest, axis=0), SMALLEST), 127.0)
    tl.store(scale_ptr + row, scale)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * columns + k, mask=k < columns, other=0.0).to(tl.float32)
        # Adding 1.5 * 2^23 leaves no bits for a fraction: round half to even.
        rounded = (tl.div_rn(x, scale) + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(rounded, -128.0), 127.0).to(tl.int8)
        tl.store(codes_ptr + row * columns + k, code, mask=k < columns)


@triton.jit
def w4a8_kernel(
    codes_ptr,
    token_scale_ptr,
    packed_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    many,
    rows,
    columns,
    BIAS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    index = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_x = index < many
    is_row = row < rows
    x_rows = codes_ptr + index.to(tl.int64)[:, None] * columns
    base = packed_ptr + row.to(tl.int64)[None, :] * (columns // 8)
    total = tl.zeros((BLOCK_X, BLOCK_ROWS), tl.int32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=is_x[:, None], other=0)
        word = tl.load(base + (k // 8)[:, None], mask=is_row[None, :], other=0)
        weight = (((word >> (k % 8 * 4)[:, None]) & 15) - 8).to(tl.int8)
        total = tl.dot(x, weight, total, out_dtype=tl.int32)
    token_scale = tl.load(token_scale_ptr + index, mask=is_x, other=0.0)
    scale = tl.load(scales_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    result = total.to(tl.float32) * token_scale[:, None] * scale[None, :]
    if BIAS:
        result += tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)[None, :]
    place = index.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=is_x[:, None] & is_row[None, :])


def quantize_constants() -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and launch options of `quantize_tokens_kernel`."""
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
    return {"SMALLEST": SMALLEST, "BLOCK_K": 1024}, options


def w4a8_constants(many: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and launch options of `w4a8_kernel`."""
    block_x = 16 if many <= 16 else 64 if many <= 512 else 128
    constants = {"BLOCK_X": block_x, "BLOCK_ROWS": 64 if many <= 512 else 128, "BLOCK_K": 32 if many > 512 else 64}
    return constants, {"num_warps": 4 if many <= 512 else 8, "num_stages": 3, "enable_fp_fusion": True}


def unsupported(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> str | None:
    """float64 is left to the reference."""
    if x.dtype == torch.float64:
        return "it scales in float32, and x is float64"
    return None if x.shape[1] % 64 == 0 else f"it reads 64 columns at a time, and x has {x.shape[1]}"


def mbq_linear_w4a8(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product as `pared_kernels.mbq_linear_w4a8` does."""
    x, packed, scales = x.contiguous(), packed.contiguous(), scales.contiguous()
    (many, columns), rows = x.shape, packed.shape[0]
    out = x.new_empty((many, rows))
    if many == 0 or rows == 0:
        return out
    codes, token_scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty((many,), dtype=torch.float32)
    constants, options = quantize_constants()
    quantize_tokens_kernel[(many,)](x, codes, token_scale, columns, **constants, **options)
    constants, options = w4a8_constants(many)
    grid = (triton.cdiv(rows, constants["BLOCK_ROWS"]), triton.cdiv(many, constants["BLOCK_X"]))
    bias_tensor = scales if bias is None else bias.contiguous()
    w4a8_kernel[grid](
        codes,
        token_scale,
        packed,
        scales,
        bias_tensor,
        out,
        many,
        rows,
        columns,
        BIAS=bias is not None,
        **constants,
        **options,
    )
    return out
