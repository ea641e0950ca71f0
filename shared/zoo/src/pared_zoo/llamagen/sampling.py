"""From logits to tokens: guidance, temperature, top-k, top-p, and the draw."""

from __future__ import annotations

import torch


def guided(logits: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance ``u + s (c - u)``.

    Args:
        logits: (2 rows, ..., vocabulary), the conditional rows first and then those of the null condition.
        guidance_scale: s; 1 gives c, 0 gives u.

    Returns:
        (rows, ..., vocabulary).
    """
    conditional, null = logits.chunk(2)
    return null + guidance_scale * (conditional - null)


def draw_tokens(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One token for each row of logits.

    Args:
        logits: (rows, vocabulary).
        temperature: above 0.
        top_k: logits below the k-th largest are left out, ties with it are kept; 0 keeps all.
        top_p: the smallest set of most likely tokens with this much probability is kept, at least one token.
        generator: of the device of ``logits``.

    Returns:
        int64 (rows,).

    Raises:
        ValueError: for a setting outside its range.
    """
    check_sampling(temperature, top_k, top_p)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # What stands before a token already has enough: the token that passes the threshold is the last one kept.
        surplus = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.masked_fill(torch.zeros_like(surplus).scatter(-1, order, surplus), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Refuse settings that give no distribution.

    Raises:
        ValueError: naming the setting, its value and what is valid.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be above 0")
    if top_k < 0:
        raise ValueError(f"top_k={top_k!r} must be at least 1, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r} must be above 0 and at most 1")
