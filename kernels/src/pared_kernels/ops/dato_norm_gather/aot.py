"""What is compiled ahead of time for `dato_norm_gather`."""

from __future__ import annotations

from collections.abc import Iterator

from ...aot import Specialization
from .triton import constants, norm_gather_kernel


def kernels() -> Iterator[Specialization]:
    """Yield the kernel for the widths of Stable Diffusion's transformer blocks."""
    for dtype in ("fp16", "bf16", "fp32"):
        for channels in (320, 1280):
            chosen, options = constants(channels, True, True)
            pointers = ("x_ptr", "weight_ptr", "bias_ptr", "out_ptr")
            yield Specialization(
                norm_gather_kernel,
                f"{dtype} C{channels}",
                dict.fromkeys(pointers, f"*{dtype}")
                | {"index_ptr": "*i64", "kept": "i32", "eps": "fp32"}
                | {"stride_batch": "i32", "stride_token": "i32", "stride_index_batch": "i32"},
                {**chosen, "stride_channel": 1, "stride_index": 1},
                options,
                aligned=(*pointers, "index_ptr", "stride_batch", "stride_token"),
            )
