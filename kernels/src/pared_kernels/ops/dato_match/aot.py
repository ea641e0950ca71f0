"""What is compiled ahead of time for `best_match`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...aot import Specialization
from .triton import best_match_constants, best_match_kernel, inverse_norm_constants, inverse_norm_kernel

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def kernels() -> Iterator[Specialization]:
    """Yield both kernels for the width of Stable Diffusion's full-resolution blocks, in every dtype."""
    strides = ("stride_batch", "stride_token")
    for name, dtype in DTYPES.items():
        constants, options = inverse_norm_constants(320)
        yield Specialization(
            inverse_norm_kernel,
            f"{name} C320",
            {"metric_ptr": f"*{name}", "inverse_ptr": "*fp32", "tokens": "i32"} | dict.fromkeys(strides, "i32"),
            {**constants, "stride_channel": 1},
            options,
            aligned=("metric_ptr", "inverse_ptr", "tokens", *strides),
        )
        pointers = {"metric_ptr": f"*{name}", "inverse_ptr": "*fp32", "similarity_ptr": "*fp32"}
        pointers |= dict.fromkeys(("query_ptr", "key_ptr", "position_ptr"), "*i64")
        counts = ("tokens", "queries", "keys", "stride_query_batch", "stride_key_batch", *strides)
        for backend in ("cuda", "hip"):
            constants, options = best_match_constants(320, dtype, hip=backend == "hip")
            yield Specialization(
                best_match_kernel,
                f"{name} C320",
                pointers | dict.fromkeys(counts, "i32"),
                {**constants, "stride_channel": 1, "stride_query": 1, "stride_key": 1},
                options,
                aligned=(*pointers, *strides),
                backend=backend,
            )
