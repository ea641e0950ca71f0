"""What is compiled ahead of time for `headwise_arrow_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...aot import Specialization
from .triton import LARGE_SHARED, SMALL_SHARED, arrow_constants, arrow_kernel

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# label, channels of a head, block, text first, padded text, dtypes
SHAPES = (
    ("D64 text last", 64, (128, 64), False, False, ("fp16", "bf16", "fp32")),
    ("D72 text first", 72, (128, 64), True, False, ("bf16", "fp32")),
    ("D128 text first", 128, (128, 64), True, False, ("fp16", "bf16", "fp32")),
    ("D128 text last, padded", 128, (128, 64), False, True, ("bf16",)),
    ("D128 exact", 128, None, True, True, ("bf16",)),
    ("D64 wide blocks", 64, (256, 256), True, False, ("bf16",)),
    ("D128 narrow blocks", 128, (16, 16), True, False, ("bf16",)),
)


def kernels() -> Iterator[Specialization]:
    """Yield the kernel for the heads of Stable Diffusion 3, Flux and video models, and for unusual blocks."""
    for shape in SHAPES:
        for name in shape[-1]:
            for wavefront in (None, 64, 32):
                yield _kernel(shape, name, SMALL_SHARED, wavefront)
            yield _kernel(shape, name, LARGE_SHARED, None)


def _kernel(shape: tuple[Any, ...], name: str, shared: int, wavefront: int | None) -> Specialization:
    label, head_dim, block, text_first, padded, _ = shape
    constants, options = arrow_constants(head_dim, DTYPES[name], block, shared=shared, wavefront=wavefront)
    pointers = {f"{one}_ptr": f"*{name}" for one in ("q", "k", "v", "out")}
    pointers |= {"live_ptr": "*i32", "valid_ptr": "*i64"}
    strides = [f"stride_{one}_{axis}" for one in "qkv" for axis in ("batch", "token", "head")]
    counts = ("batch_size", "num_vision", "num_text", "heads")
    return Specialization(
        arrow_kernel,
        f"{name} {label}{', read ahead' if shared == LARGE_SHARED else ''}",
        {**pointers, **dict.fromkeys((*counts, *strides), "i32"), "scale": "fp32"},
        {**constants, "TEXT_FIRST": text_first, "HAS_VALID": padded},
        options,
        aligned=(*pointers, *strides),
        backend="hip" if wavefront else "cuda",
        warp=wavefront,
        shared=shared,
        shared_below=LARGE_SHARED if shared == SMALL_SHARED else None,
    )
