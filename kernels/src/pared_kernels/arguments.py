"""Checks of operator arguments; they raise errors that name the argument, its value and what is valid."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, name: str, value: object, valid: str) -> None:
    """Raise ValueError for argument `name` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name} is {value}; valid: {valid}")


def require_tensor(name: str, value: object, dims: int | tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError or ValueError unless `value` is a tensor of `dims` dimensions and one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; valid: a tensor")
    allowed = (dims,) if isinstance(dims, int) else dims
    if value.dim() not in allowed:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; valid: {' or '.join(map(str, allowed))} dimensions")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; valid: {', '.join(map(str, dtypes))}")


def require_index(name: str, value: object, batch: int, like: Tensor) -> None:
    """Raise unless `value` is an int64 index of shape (batch, count) on the device of `like`."""
    require_tensor(name, value, 2, (torch.int64,))
    assert isinstance(value, Tensor)
    require(value.shape[0] == batch, f"batch of {name}", value.shape[0], str(batch))
    require(value.device == like.device, f"device of {name}", value.device, str(like.device))
