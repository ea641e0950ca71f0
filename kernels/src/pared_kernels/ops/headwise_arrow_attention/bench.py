"""Attention layers of Stable Diffusion 3.5 and Flux at 1024 and 2048 pixels, by the share of heads that is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...bench import BenchCase
from .geometry import FULL, SKIP, Arrow, visited_pairs

# name, vision tokens, text tokens, text first, heads, channels of a head
SD35 = ("SD3.5-large 1024", 4096, 333, False, 38, 64)
FLUX = ("FLUX 1024", 4096, 512, True, 24, 128)
FLUX_2K = ("FLUX 2048", 16384, 512, True, 24, 128)
SMALL = ("1024 tokens", 1024, 64, False, 4, 64)

MIXES = {
    "all full": (FULL,),
    "quarter cut": (FULL, FULL, 16, 8),
    "half reused": (SKIP, FULL, SKIP, 16),
    "arrows 1/16": (16,),
    "mostly reused": (SKIP, SKIP, 32, SKIP),
}
"""Dealt to the heads in turn: full, skipped, or an arrow whose band is one so-manieth of the picture."""


def dense(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Return full attention of all heads by torch, whatever is asked for: what compression competes with."""
    return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def with_backend(backend: SDPBackend) -> Callable[..., Tensor]:
    """Return the same by one of torch's kernels."""

    def run(*arguments: Any) -> Tensor:
        with sdpa_kernel(backend):
            return dense(*arguments)

    return run


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield every mix for layers of real models; one small layer unless `full`."""
    dtypes = (torch.bfloat16,) if full else (torch.float32,)
    for name, vision, text, text_first, heads, head_dim in (SD35, FLUX, FLUX_2K) if full else (SMALL,):
        for dtype in dtypes:
            q, k, v, out = (
                torch.randn(1, vision + text, heads, head_dim, device=device, dtype=dtype) for _ in range(4)
            )
            for mix, dealt in MIXES.items():
                shares = [dealt[head % len(dealt)] for head in range(heads)]
                windows = [share if share <= 0 else vision // share // 2 for share in shares]
                live = [window for window in windows if window != SKIP]
                pairs = sum(visited_pairs(Arrow(vision, text, window, text_first), (128, 64)) for window in live)
                cudnn = {"cuDNN": with_backend(SDPBackend.CUDNN_ATTENTION)} if device.type == "cuda" else {}
                yield BenchCase(
                    f"{name}, {mix}",
                    (q, k, v, out, windows, text, text_first, 128, 64, None, head_dim**-0.5),
                    bytes=4 * len(live) * (vision + text) * head_dim * torch.finfo(dtype).bits // 8,
                    flops=4 * head_dim * pairs,
                    dtype=dtype,
                    matrix=True,
                    baselines={"torch": dense, **cudnn},
                )
