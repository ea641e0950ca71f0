"""What is compiled ahead of time for `mbq_linear_w16`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...aot import Specialization
from .triton import (
    dequantize_constants,
    dequantize_kernel,
    gemm_constants,
    gemm_kernel,
    gemv_constants,
    gemv_kernel,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def kernels() -> Iterator[Specialization]:
    """Yield every kernel for 3 and 4 bits in groups of 128, in both 16-bit dtypes."""
    for bits in (3, 4):
        for name in DTYPES:
            pointers = {"x_ptr": f"*{name}", "packed_ptr": "*i32", "scales_ptr": "*fp16", "zeros_ptr": "*u8"}
            pointers |= {"bias_ptr": f"*{name}", "out_ptr": f"*{name}"}
            counts = dict.fromkeys(("rows", "columns", "groups", "steps"), "i32")
            flags = {"SYMMETRIC": False, "BIAS": True}
            constants, options = gemv_constants(bits, 128)
            yield Specialization(
                gemv_kernel,
                f"W{bits} {name}",
                pointers | counts,
                {**constants, **flags},
                options,
                aligned=(*pointers, "rows", "columns"),
            )
            for many in (16, 64):
                constants, options = gemm_constants(bits, 128, many)
                yield Specialization(
                    gemm_kernel,
                    f"W{bits} {name} M{many}",
                    pointers | {"many": "i32"} | counts,
                    {**constants, **flags, "WIDEN": False},
                    options,
                    aligned=(*pointers, "rows", "columns"),
                )
            constants, options = dequantize_constants(bits, 128)
            kept = {place: pointers[place] for place in ("packed_ptr", "scales_ptr", "zeros_ptr", "out_ptr")}
            yield Specialization(
                dequantize_kernel,
                f"W{bits} {name}",
                kept | {"columns": "i32", "groups": "i32"},
                {**constants, "SYMMETRIC": False},
                options,
                aligned=(*kept, "columns"),
            )
