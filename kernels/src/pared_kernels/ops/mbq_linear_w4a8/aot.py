"""What is compiled ahead of time for `mbq_linear_w4a8`."""

from __future__ import annotations

from collections.abc import Iterator

from ...aot import Specialization
from .triton import quantize_constants, quantize_tokens_kernel, w4a8_constants, w4a8_kernel


def kernels() -> Iterator[Specialization]:
    """Yield both kernels in both 16-bit dtypes, the product for decoding, short and long prompts."""
    for name in ("fp16", "bf16"):
        pointers = {"x_ptr": f"*{name}", "codes_ptr": "*i8", "scale_ptr": "*fp32"}
        constants, options = quantize_constants()
        yield Specialization(
            quantize_tokens_kernel,
            name,
            pointers | {"columns": "i32"},
            constants,
            options,
            aligned=(*pointers, "columns"),
        )
        pointers = {"codes_ptr": "*i8", "token_scale_ptr": "*fp32", "packed_ptr": "*i32", "scales_ptr": "*fp16"}
        pointers |= {"bias_ptr": f"*{name}", "out_ptr": f"*{name}"}
        for many in (16, 64, 4096):
            constants, options = w4a8_constants(many)
            yield Specialization(
                w4a8_kernel,
                f"{name} M{many}",
                pointers | dict.fromkeys(("many", "rows", "columns"), "i32"),
                {**constants, "BIAS": True},
                options,
                aligned=(*pointers, "rows", "columns"),
            )
