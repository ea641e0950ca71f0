"""What is compiled ahead of time for `framefusion_segment_mean_compact`."""

from __future__ import annotations

from collections.abc import Iterator

from ...aot import Specialization
from .triton import constants, segment_mean_kernel


def kernels() -> Iterator[Specialization]:
    """Yield the kernel for the widths of Qwen2-0.5B and Qwen2-7B, plain and weighted."""
    for dtype in ("fp16", "bf16", "fp32"):
        for channels in (896, 3584):
            for weighted in (False, True):
                chosen, options = constants(channels, weighted)
                indices = ("order_ptr", "start_ptr", "index_ptr")
                pointers = {"hidden_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"} | dict.fromkeys(indices, "*i64")
                pointers["weight_ptr"] = "*fp32" if weighted else f"*{dtype}"
                yield Specialization(
                    segment_mean_kernel,
                    f"{dtype} D{channels}{' weighted' if weighted else ''}",
                    pointers | dict.fromkeys(("tokens", "segments", "stride_batch", "stride_token"), "i32"),
                    {**chosen, "stride_channel": 1},
                    options,
                    aligned=(*pointers, "stride_batch", "stride_token"),
                )
