"""Linear layers of a 7B language model in W4A8, from decoding to long prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...bench import BenchCase
from ...bitstream import words
from ..mbq_linear_w16.bench import SHAPES, SMALL, dense
from ..mbq_linear_w16.reference import dequantize


def dequantize_then_matmul(*arguments: Any) -> Tensor:
    """Plain torch on the packed weight, without quantised activations: unpack, dequantise, multiply."""
    x, packed, scales, bias = arguments
    weight = dequantize(packed, scales, None, 4, x.shape[1], x.shape[1], x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield decoding and prompts; one small layer unless `full`."""
    dtype = torch.bfloat16
    for rows, columns in SHAPES if full else SMALL:
        for many in (1, 8, 64, 1024, 4096) if full else (1, 16, 64):
            x = torch.randn(many, columns, device=device, dtype=dtype)
            drawn = torch.randint(-(2**31), 2**31, (rows, words(columns, 4)), device=device, dtype=torch.int64)
            scales = (0.01 * torch.rand(rows, 1, device=device)).half()
            weight = torch.randn(rows, columns, device=device, dtype=dtype)
            yield BenchCase(
                f"W4A8 M{many} N{rows} K{columns}",
                (x, drawn.to(torch.int32), scales, None),
                bytes=rows * columns // 2 + 2 * rows + 2 * (x.numel() + many * rows),
                flops=2 * many * rows * columns,
                dtype=torch.int8,
                matrix=True,
                baselines={"torch": dequantize_then_matmul, "dense": dense(weight)},
            )
