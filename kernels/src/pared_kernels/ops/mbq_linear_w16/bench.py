"""Linear layers of Qwen2-7B, the text part of LLaVA-OneVision-7B, in 3 and 4 bits, groups of 128."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...bench import BenchCase
from ...bitstream import words
from . import reference

#: (rows, columns) of gate and up, of down, of query and output, of key and value.
SHAPES = ((18944, 3584), (3584, 18944), (3584, 3584), (512, 3584))
SMALL = ((1024, 2048),)


def dequantize_then_matmul(*arguments: Any) -> Tensor:
    """Plain torch on the packed weight: unpack it whole, dequantise to the dtype of x, multiply."""
    x, packed, scales, zeros, bits, group_size, bias = arguments
    weight = reference.dequantize(packed, scales, zeros, bits, group_size, x.shape[1], x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def dense(weight: Tensor) -> Callable[..., Tensor]:
    """The layer before quantisation: a product with a 16-bit weight (32-bit on the CPU's float32 case)."""
    return lambda x, *_: torch.nn.functional.linear(x, weight)


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield decoding (1 to 16 rows of x), a short and a long prompt; one small layer unless `full`."""
    for rows, columns in SHAPES if full else SMALL:
        for bits in (3, 4):
            for many in (1, 4, 8, 16, 64, 1024) if full else (1, 16, 64):
                yield _case(device, torch.bfloat16, many, rows, columns, bits)


def _case(device: torch.device, dtype: torch.dtype, many: int, rows: int, columns: int, bits: int) -> BenchCase:
    group_size = 128
    groups = columns // group_size
    x = torch.randn(many, columns, device=device, dtype=dtype)

    def drawn(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, device=device, dtype=torch.int64).to(torch.int32)

    packed, zeros = drawn(rows, words(columns, bits)), drawn(words(rows, bits), groups)
    scales = (0.01 * torch.rand(rows, groups, device=device)).half()
    weight = torch.randn(rows, columns, device=device, dtype=dtype)
    read = 4 * packed.numel() + 4 * zeros.numel() + 2 * scales.numel()
    moved = read + x.element_size() * (x.numel() + many * rows)
    return BenchCase(
        f"W{bits} g{group_size} M{many} N{rows} K{columns}",
        (x, packed, scales, zeros, bits, group_size, None),
        bytes=moved,
        flops=2 * many * rows * columns,
        dtype=dtype,
        matrix=True,
        # "torch" is what a packed checkpoint costs without the kernel, "dense" what the unquantised layer costs.
        baselines={"torch": dequantize_then_matmul, "dense": dense(weight)},
    )
