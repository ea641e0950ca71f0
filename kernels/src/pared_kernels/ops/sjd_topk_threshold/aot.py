"""What is compiled ahead of time for `sjd_topk_threshold`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...aot import Specialization
from .triton import constants, threshold_kernel


def kernels() -> Iterator[Specialization]:
    """Yield the kernel for every dtype."""
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        chosen, options = constants(dtype)
        yield Specialization(
            threshold_kernel,
            name,
            {"logits_ptr": f"*{name}", "out_ptr": "*fp32", "columns": "i32", "k": "i32", "stride_row": "i32"},
            chosen,
            options,
            aligned=("logits_ptr", "columns", "stride_row"),
        )
