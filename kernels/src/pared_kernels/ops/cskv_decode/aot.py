"""What is compiled ahead of time for `cskv_decode`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...aot import Specialization
from .triton import (
    VARYING,
    combine_constants,
    combine_kernel,
    split_constants,
    split_kernel,
    too_large,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# label, key-value heads, query heads of each, channels of a head, rank, bits, and dtypes
SHAPES = (
    ("Llama-3.1-8B r200", 8, 4, 128, 200, 0, ("fp16", "bf16", "fp32")),
    ("Llama-3.1-8B r200 int4", 8, 4, 128, 200, 4, ("bf16",)),
    ("LongChat-7B r800", 32, 1, 128, 800, 0, ("bf16",)),
    ("Llama-3.1-8B r205", 8, 4, 128, 205, 0, ("bf16",)),
    ("D128 r16", 8, 4, 128, 16, 0, ("bf16",)),
    ("D128 r512", 8, 4, 128, 512, 0, ("bf16", "fp32")),
    ("D128 r512 one key head", 1, 32, 128, 512, 0, ("bf16",)),
    ("Qwen2.5-0.5B r64", 2, 7, 64, 64, 0, ("bf16",)),
    ("D256 r256", 4, 2, 256, 256, 0, ("bf16",)),
)


def kernels() -> Iterator[Specialization]:
    """Yield both kernels for layers of real models and for the largest ranks, biases and padding included."""
    for label, heads, group, head_dim, rank, bits, dtypes in SHAPES:
        for dtype in dtypes:
            for wavefront in (None, 64, 32):
                shape = (DTYPES[dtype], dtype, heads, group, head_dim, rank, bits, wavefront)
                if _fits(*shape):
                    yield _split(f"{dtype} {label}", *shape)
            constants, options = combine_constants(
                query_heads=heads * group, group=group, head_dim=head_dim, rank_v=rank
            )
            partial = ("latent_ptr", "exact_ptr", "largest_ptr", "total_ptr")
            outer = ("b_v_ptr", "bias_v_ptr", "out_ptr")
            yield Specialization(
                combine_kernel,
                f"{dtype} {label}",
                {**dict.fromkeys(partial, "*fp32"), **dict.fromkeys(outer, f"*{dtype}"), "splits": "i32"},
                {**constants, "HAS_BIAS": True},
                options,
                aligned=(*partial, *outer),
            )


def _fits(
    dtype: torch.dtype, name: str, heads: int, group: int, head_dim: int, rank: int, bits: int, wavefront: int | None
) -> bool:
    rows = (rank, rank)
    return (
        too_large(dtype, group=group, head_dim=head_dim, rank_v=rank, rows=rows, packed=bits > 0, wavefront=wavefront)
        is None
    )


def _split(
    label: str,
    dtype: torch.dtype,
    name: str,
    heads: int,
    group: int,
    head_dim: int,
    rank: int,
    bits: int,
    wavefront: int | None,
) -> Specialization:
    constants, options = split_constants(
        dtype,
        heads=heads,
        group=group,
        head_dim=head_dim,
        rotary_pairs=head_dim // 2,
        rank_k=rank,
        rank_v=rank,
        packed=bits > 0,
        wavefront=wavefront,
    )
    floating = ("q", "c_k", "c_v", "b_k", "bias_k", "k_tail", "v_tail", "cos", "sin")
    pointers = {f"{one}_ptr": f"*{name}" for one in floating}
    pointers |= {f"{one}_ptr": "*fp32" for one in ("latent", "exact", "largest", "total")}
    pointers |= {f"{side}_codes_ptr": "*u8" for side in "kv"}
    pointers |= {f"{side}_{part}_ptr": "*fp16" for side in "kv" for part in ("scale", "offset")}
    pointers["start_ptr"] = "*i64"
    strides = [f"stride_{side}_{axis}" for side in "kv" for axis in ("batch", "head", "token")]
    return Specialization(
        split_kernel,
        label,
        {**pointers, **dict.fromkeys((*VARYING, *strides), "i32"), "scale": "fp32"},
        {
            **constants,
            "ROW_K": rank,
            "ROW_V": rank,
            "ROW_ROTARY": head_dim // 2,
            "K_BITS": bits,
            "V_BITS": bits,
            "K_GROUP": 32,
            "V_GROUP": rank // heads,
            "CLAMPED": False,
            "HAS_START": True,
            "HAS_BIAS": True,
        },
        options,
        aligned=(*pointers, *strides),
        backend="hip" if wavefront else "cuda",
        warp=wavefront,
    )
