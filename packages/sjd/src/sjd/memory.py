"""How much memory stored distributions take, and a warning when it is a large part of what is free."""

from __future__ import annotations

import os
import warnings

import torch

SHARE = 0.25


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, or None where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def warn_if_large(rows: int, window: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """Warn when the stored distributions of a window take more than a quarter of the free memory."""
    free = free_memory(device)
    each = rows * columns * (8 if dtype == torch.float64 else 4)
    if free is None or window * each <= SHARE * free:
        return
    warnings.warn(
        f"the distributions of a window of {window} take {window * each / 2**20:.0f} MiB, more than a quarter of the "
        f"free {free / 2**20:.0f} MiB; window={max(int(SHARE * free // each), 1)} fits",
        stacklevel=4,
    )
