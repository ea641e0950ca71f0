"""What is compiled ahead of time for `dato_recover_add`."""

from __future__ import annotations

from collections.abc import Iterator

from ...aot import Specialization
from .triton import constants, recover_add_kernel


def kernels() -> Iterator[Specialization]:
    """Yield the kernel for the width of Stable Diffusion's blocks, and gated as in diffusion transformers."""
    pointers = ("x_ptr", "y_ptr", "gate_ptr", "out_ptr")
    strides = ("stride_x_batch", "stride_x_token", "stride_y_batch", "stride_y_token")
    for dtype in ("fp16", "bf16", "fp32"):
        for channels, has_gate in ((320, False), (1152, True)):
            chosen, options = constants(channels, has_gate)
            yield Specialization(
                recover_add_kernel,
                f"{dtype} C{channels}{' gate' if has_gate else ''}",
                dict.fromkeys(pointers, f"*{dtype}")
                | dict.fromkeys((*strides, "tokens", "stride_map_batch", "stride_gate_batch"), "i32")
                | {"map_ptr": "*i64"},
                {
                    **chosen,
                    "stride_x_channel": 1,
                    "stride_y_channel": 1,
                    "stride_map": 1,
                    "stride_gate_channel": 1,
                },
                options,
                aligned=(*pointers, *strides, "map_ptr"),
            )
