"""What is compiled ahead of time for `cskv_quant_flush`."""

from __future__ import annotations

from collections.abc import Iterator

from ...aot import Specialization
from .triton import flush_constants, over_channels_kernel, over_tokens_kernel


def kernels() -> Iterator[Specialization]:
    """Yield both groupings for ranks of Llama-3.1-8B and LongChat-7B, and the longest row of one token."""
    for dtype in ("fp16", "bf16", "fp32"):
        for label, rank, heads, bits, clamped in (
            ("r200 int4", 200, 8, 4, False),
            ("r800 int2", 800, 32, 2, True),
            ("r4096 int8", 4096, 32, 8, False),
        ):
            for kernel in (over_tokens_kernel, over_channels_kernel):
                per_token = kernel is over_channels_kernel
                group = rank // heads if per_token else 32
                constants, options = flush_constants(
                    channels=rank, bits=bits, group=group, per_token=per_token, clamped=clamped
                )
                strides = [name for name in kernel.arg_names if name.startswith("stride_")]
                yield Specialization(
                    kernel,
                    f"{dtype} {label}",
                    {"latents_ptr": f"*{dtype}", "codes_ptr": "*u8", "scale_ptr": "*fp16", "offset_ptr": "*fp16"}
                    | {name: "i32" for name in strides if name != "stride_channel"},
                    {**constants, "stride_channel": 1},
                    options,
                    aligned=("latents_ptr",),
                )
