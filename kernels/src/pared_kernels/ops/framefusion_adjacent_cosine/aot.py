"""What is compiled ahead of time for `framefusion_adjacent_cosine`."""

from __future__ import annotations

from collections.abc import Iterator

from ...aot import Specialization
from .triton import adjacent_cosine_kernel, constants


def kernels() -> Iterator[Specialization]:
    """Yield the kernel for the widths of Qwen2-0.5B and Qwen2-7B."""
    for dtype in ("fp16", "bf16", "fp32"):
        for channels in (896, 3584):
            chosen, options = constants(channels)
            yield Specialization(
                adjacent_cosine_kernel,
                f"{dtype} D{channels}",
                {"hidden_ptr": f"*{dtype}", "prev_ptr": "*i64", "out_ptr": "*fp32"}
                | dict.fromkeys(("tokens", "stride_batch", "stride_token", "stride_prev_batch"), "i32"),
                {**chosen, "stride_channel": 1, "stride_prev": 1},
                options,
                aligned=("hidden_ptr", "prev_ptr", "out_ptr", "stride_batch", "stride_token"),
            )
