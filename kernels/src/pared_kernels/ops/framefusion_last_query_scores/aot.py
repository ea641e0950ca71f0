"""What is compiled ahead of time for `framefusion_last_query_scores`."""

from __future__ import annotations

from collections.abc import Iterator

from ...aot import Specialization
from .triton import constants, mean_weights_kernel, partial_softmax_kernel


def kernels() -> Iterator[Specialization]:
    """Yield both kernels for Qwen2-7B, with and without a mask, and with the four queries used for Qwen2-VL."""
    strides = ("query_batch", "query_head", "query", "key_batch", "key_head", "key", "valid_batch")
    for dtype in ("fp16", "bf16", "fp32"):
        for queries, masked in ((1, False), (1, True), (4, False)):
            chosen, options = constants(28, 4, queries, 128, masked)
            pointers = dict.fromkeys(("query_ptr", "key_ptr"), f"*{dtype}")
            pointers |= dict.fromkeys(("max_ptr", "sum_ptr"), "*fp32")
            pointers["valid_ptr"] = "*u8" if masked else f"*{dtype}"
            numbers = {"tokens": "i32", "scaling": "fp32"} | {f"stride_{name}": "i32" for name in strides}
            label = f"{dtype} Q{queries}{' masked' if masked else ''}"
            aligned = ("query_ptr", "key_ptr", "stride_key", "stride_key_head", "stride_query_head")
            yield Specialization(
                partial_softmax_kernel, label, pointers | numbers | {"splits": "i32"}, chosen, options, aligned=aligned
            )
            yield Specialization(
                mean_weights_kernel, label, pointers | numbers | {"out_ptr": "*fp32"}, chosen, options, aligned=aligned
            )
