"""What is compiled ahead of time for `sjd_gumbel_argmax`."""

from __future__ import annotations

from collections.abc import Iterator

from ...aot import Specialization
from .triton import argmax_kernel, constants


def kernels() -> Iterator[Specialization]:
    """Yield the kernel for every dtype."""
    numbers = dict.fromkeys(
        ("columns", "width", "seed_low", "seed_high", "stream", "first", "stride_batch", "stride_position"), "i32"
    )
    pointers = {"rows_ptr": "*i64", "positions_ptr": "*i64", "out_ptr": "*i64"}
    for dtype in ("fp16", "bf16", "fp32"):
        chosen, options = constants()
        yield Specialization(
            argmax_kernel,
            dtype,
            {"probs_ptr": f"*{dtype}"} | pointers | numbers,
            chosen,
            options,
            aligned=("probs_ptr", "columns", "stride_position"),
        )
