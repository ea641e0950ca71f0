"""Windows of image models: 8192 image columns, and whole vocabularies of 65536."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...bench import BenchCase
from . import reference


def cases(device: torch.device, full: bool) -> Iterator[BenchCase]:
    """Yield windows of 15 and 63 drafts; a small one unless `full`."""
    shapes = ((1, 15, 8192), (1, 63, 8192), (4, 31, 8192), (1, 63, 65536)) if full else ((1, 15, 512),)
    for batch, window, columns in shapes:
        dtype = torch.bfloat16 if full else torch.float32
        arguments = example(batch, window, columns, dtype, device)
        rows = batch * (2 * window + 1)
        yield BenchCase(
            f"B{batch} W{window} V{columns}",
            arguments,
            # Logits and q are read once, p is written.
            bytes=batch * (window + 1) * columns * arguments[0].element_size() + rows * columns * 4,
            flops=rows * columns * 8,
            dtype=torch.float32,
            matrix=False,
            baselines={"torch": reference.sjd_step, "published": published},
        )


def example(batch: int, window: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """Arguments as they are in the middle of an image."""
    logits = torch.randn(batch, window + 1, columns, device=device, dtype=dtype)
    previous = (logits[:, :window].float() + 0.3 * torch.randn(batch, window, columns, device=device)).softmax(-1)
    drafts = previous.flatten(0, 1).multinomial(1).view(batch, window)
    source = torch.arange(window, device=device).repeat(batch, 1)
    uniforms = torch.rand(batch, 2 * window + 1, device=device)
    threshold = logits.float().topk(min(2000, columns // 2), -1).values[..., -1]
    forced = torch.full((batch, window + 1), -1, device=device)
    valid = torch.ones(batch, window, dtype=torch.bool, device=device)
    limit = torch.full((batch,), window + 1, device=device)
    return (
        logits, drafts, previous, source, uniforms[:, :window], uniforms[:, window:].double(), threshold, forced, valid,
        limit, 1.0, True,
    )  # fmt: skip


def published(
    logits: Tensor, drafts: Tensor, previous: Tensor, source: Tensor, u_accept: Tensor, u_sample: Tensor,
    threshold: Tensor, forced: Tensor, valid: Tensor, limit: Tensor, temperature: float, maximal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The way of published implementations: softmax, then one position after the other, with host reads."""
    scores = logits.float().masked_fill(logits.float() < threshold[..., None], -torch.inf)
    p = (scores / temperature).softmax(-1)
    tokens = p.flatten(0, 1).multinomial(1).view(p.shape[:2])
    committed = torch.ones_like(limit)
    for row in range(len(p)):
        for k in range(drafts.shape[1]):
            token = drafts[row, k]
            noise = torch.rand(p.shape[-1], device=p.device)[token]
            if noise.item() < (p[row, k, token] / previous[row, k, token]).clamp(max=1).item():
                tokens[row, k] = token
                continue
            residual = (p[row, k] - previous[row, k]).clamp(min=0)
            tokens[row, k] = (residual / residual.sum()).multinomial(1)[0]
            break
        committed[row] = k + 1
    return tokens, committed, p
