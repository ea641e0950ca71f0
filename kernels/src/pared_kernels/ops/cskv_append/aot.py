"""What is compiled ahead of time for `cskv_append`."""

from __future__ import annotations

from collections.abc import Iterator

from ...aot import Specialization
from .triton import append_constants, append_kernel


def kernels() -> Iterator[Specialization]:
    """Yield the kernel for a layer of Llama-3.1-8B and of LongChat-7B, the first with a rotary row."""
    tensors = ("hidden", "down", "key", "value", "c_k", "c_v", "k_row", "v_row", "cos", "sin", "cos_row", "sin_row")
    pointers = [f"{name}_ptr" for name in tensors]
    strides = [name for name in append_kernel.arg_names if name.startswith("stride_")]
    for dtype in ("fp16", "bf16", "fp32"):
        for label, heads, rank, rotary in (("Llama-3.1-8B r200", 8, 200, 64), ("LongChat-7B r800", 32, 800, 0)):
            constants, options = append_constants(rank_k=rank, rank_v=rank, heads=heads, head_dim=128, rotary=rotary)
            yield Specialization(
                append_kernel,
                f"{dtype} {label}",
                dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(("width", *strides), "i32"),
                constants,
                options,
                aligned=(*pointers, "width"),
            )
