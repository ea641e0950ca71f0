"""Codebooks on the unit sphere: the nearest code, new codes where old ones are far, and how evenly they are used."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

#: Rounds of moving every code to the mean of what it stands for.
ROUNDS = 4


def nearest_code(directions: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the code with the largest product; for unit vectors that is the nearest one.

    Args:
        directions: (..., channels).
        codebook: unit vectors (codes, channels).

    Returns:
        int64 (...).
    """
    return (directions.float() @ codebook.float().T).argmax(-1)


def separate_codes(codebook: torch.Tensor, counts: torch.Tensor, apart: float) -> torch.Tensor:
    """Indices int64 of codes that occur and are ``apart`` from each other; of two that are near the commoner one stays.

    Args:
        codebook: unit vectors (codes, channels).
        counts: how often each occurs, (codes,).
        apart: least distance, one minus the product.
    """
    near = codebook @ codebook.T > 1 - apart
    kept = torch.zeros(len(codebook), dtype=torch.bool, device=codebook.device)
    for k in counts.argsort(descending=True, stable=True).tolist():
        kept[k] = bool(counts[k] > 0) and not (near[k] & kept).any()
    return kept.nonzero().flatten()


def spread_codes(
    directions: torch.Tensor,
    codes: int,
    generator: torch.Generator,
    kept: torch.Tensor | None = None,
    apart: float = 0.0,
) -> torch.Tensor:
    """A codebook for ``directions``: the odds of each to become a code grow with its squared distance to the others.

    That is the seeding of k-means++ (Arthur and Vassilvitskii 2007), followed by a few rounds of spherical k-means
    when there are no ``kept`` codes. Pictures are mostly background: codes drawn evenly would all lie there.

    Args:
        directions: unit vectors (vectors, channels), at least one.
        codes: how many codes the result has.
        generator: draws the new codes; on the CPU.
        kept: unit vectors (up to codes, channels) that stay, and come first.
        apart: vectors nearer than this to a code (one minus the product) do not become one while others are left.

    Returns:
        float32 unit vectors (codes, channels).
    """
    directions = directions.float()
    book = directions.new_zeros(codes, directions.shape[1])
    count = 0 if kept is None else len(kept)
    distance = directions.new_full((len(directions),), torch.inf)
    if kept is not None and count:
        book[:count] = kept
        distance = 1 - (directions @ book[:count].T).amax(dim=1)
    for k in range(count, codes):
        far = distance > apart
        weight = (torch.where(far, distance, 0) if far.any() else distance.clamp(min=0)).cpu()
        # Nothing is far from a code, or there is none yet: any vector will do.
        even = not torch.isfinite(weight).all() or weight.sum() <= 0
        row = torch.multinomial(torch.ones_like(weight) if even else weight, 1, generator=generator).item()
        book[k] = directions[int(row)]
        distance = torch.minimum(distance, 1 - directions @ book[k])
    for _ in range(0 if count else ROUNDS):
        sums = torch.zeros_like(book).index_add_(0, nearest_code(directions, book), directions)
        used = sums.norm(dim=1) > 0
        book[used] = normalize(sums[used], dim=1)
    return book


def code_usage(indices: torch.Tensor, codes: int) -> tuple[int, float]:
    """(number of codes that occur, exponential of the entropy of their frequencies)."""
    share = torch.bincount(indices.flatten(), minlength=codes).double() / indices.numel()
    present = share[share > 0]
    return len(present), float((-(present * present.log()).sum()).exp())
