"""One new token into a low-rank cache: its latents, its exact key and value, its rotary row."""

from __future__ import annotations

from torch import Tensor

from ...arguments import FLOATS, require, require_tensor
from ...registry import define
from . import reference

__all__ = ["cskv_append"]

_operator = define(
    reference.cskv_append, lambda *given: None, mutates=("c_k", "c_v", "k_row", "v_row", "cos_row", "sin_row")
)


def cskv_append(
    hidden: Tensor,
    down: Tensor,
    key: Tensor,
    value: Tensor,
    c_k: Tensor,
    c_v: Tensor,
    k_row: Tensor,
    v_row: Tensor,
    *,
    rotary: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Write A x, the exact key and value, and the rotary row of one token where they belong (CSKV, section 3.4).

    What is written are rows of a cache, views of its tensors at the token's place, with any strides.

    Args:
        hidden: (B, d), input x of the projections; float16, bfloat16, float32 or float64, as are all tensors.
        down: (r_k + r_v, d), A of keys stacked on A of values.
        key, value: (B, H_kv, D), the key rotated.
        c_k, c_v: (B, r_k), (B, r_v), written: A x, summed in float32 or better and rounded once.
        k_row, v_row: (B, H_kv, D), written: key and value.
        rotary: cos and sin (B or 1, pairs) of the token, and the two rows of that shape that they are written to; None
            where another layer writes them.

    Raises:
        TypeError, ValueError: for wrong dtypes or shapes.
    """
    require_tensor("hidden", hidden, 2, FLOATS)
    batch, width = hidden.shape
    for name, tensor, dims in (
        ("down", down, 2),
        ("key", key, 3),
        ("value", value, 3),
        ("c_k", c_k, 2),
        ("c_v", c_v, 2),
        ("k_row", k_row, 3),
        ("v_row", v_row, 3),
    ):
        require_tensor(name, tensor, dims, (hidden.dtype,))
    require(key.shape[0] == batch, "batch of key", key.shape[0], f"{batch}, as of hidden")
    for name, tensor, shape in (
        ("c_k", c_k, (batch, c_k.shape[1])),
        ("c_v", c_v, (batch, c_v.shape[1])),
        ("down", down, (c_k.shape[1] + c_v.shape[1], width)),
        ("value", value, key.shape),
        ("k_row", k_row, key.shape),
        ("v_row", v_row, key.shape),
    ):
        require(tensor.shape == shape, f"shape of {name}", tuple(tensor.shape), f"{tuple(shape)}")
    if rotary is not None:
        rows = 1 if rotary[0].shape[0] == 1 else batch
        for name, tensor in zip(("cos", "sin", "cos_row", "sin_row"), rotary, strict=True):
            require_tensor(name, tensor, 2, (rotary[0].dtype,))
            shape = (rows, rotary[0].shape[1])
            require(tensor.shape == shape, f"shape of {name}", tuple(tensor.shape), f"{shape}")
    _operator(hidden, down, key, value, c_k, c_v, k_row, v_row, *(rotary or (None,) * 4))
