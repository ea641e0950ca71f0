"""First guesses for positions that no pass has seen yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from sjd.errors import GrammarError
from sjd.functional.randomness import inverse_cdf

Scheme = Literal["random", "uniform", "left", "above", "left_sample", "above_sample", "auto"]
SCHEMES = ("random", "uniform", "left", "above", "left_sample", "above_sample", "auto")
WITHOUT_GRID = ("random", "uniform", "left", "auto")
SAMPLED = ("left_sample", "above_sample")


def initial_drafts(
    known: Tensor,
    first_position: Tensor,
    count: int,
    grammar: Any,
    *,
    scheme: Scheme,
    generator: torch.Generator | None = None,
    vocab: int | None = None,
    neighbour_probs: Callable[[Tensor], Tensor] | None = None,
    offset: int = 0,
) -> tuple[Tensor, str | Tensor]:
    """Return drafts (B, count) int64 for the positions from `first_position` on, and the law they were drawn from.

    The law is "onehot" (a draft that is certain), "uniform" over the allowed tokens, or probabilities (B, count, V). A
    draft depends on tokens in front of it alone. Copying schemes fill from left to right, so a cell whose neighbour is
    being filled takes that neighbour's source (arXiv 2410.01699, section 3.3).

    - "random", "uniform": a uniform allowed token; taken as certain (paper), or with its law, which accepts more.
    - "left", "above": the token of the neighbouring cell; random in the first column, or row.
    - "auto": "above", in the first row "left"; without a grid "left".
    - "left_sample", "above_sample": drawn from the neighbour's distribution, uniform where there is none.

    Args:
        known: (B, T) int64 tokens, right at all positions below `first_position`; first_position: (B,) int64.
        grammar: an `ImageGrammar`, or None for text; forced positions get the forced token whatever the scheme.
        vocab: number of tokens, where the grammar allows all.
        neighbour_probs: for the sampled schemes; takes positions (B, count) below `first_position`, negative where
            there is no neighbour, and returns their last distributions (B, count, V). Column v stands for token
            `offset` + v.

    Raises `GrammarError` for a scheme that needs a grid where there is none, or missing `vocab` or `neighbour_probs`;
    ValueError for an unknown scheme.
    """
    place = known.device if generator is None else generator.device
    shape = (len(known), count)
    uniforms = torch.rand(shape, generator=generator, device=place, dtype=torch.float64).to(known.device)
    return drafts_from(
        uniforms, known, first_position, grammar, scheme=scheme, vocab=vocab, neighbour_probs=neighbour_probs,
        offset=offset,
    )  # fmt: skip


def drafts_from(
    uniforms: Tensor,
    known: Tensor,
    first_position: Tensor,
    grammar: Any,
    *,
    scheme: Scheme,
    vocab: int | None = None,
    neighbour_probs: Callable[[Tensor], Tensor] | None = None,
    offset: int = 0,
) -> tuple[Tensor, str | Tensor]:
    """`initial_drafts` with its uniform numbers (B, count) given."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; valid: {', '.join(SCHEMES)}")
    has_grid = grammar is not None and grammar.has_grid
    if not has_grid and scheme not in WITHOUT_GRID:
        raise GrammarError(f"init {scheme!r} needs a grid of image cells; valid for text: {', '.join(WITHOUT_GRID)}")
    count = uniforms.shape[1]
    position = first_position[:, None] + torch.arange(count, device=known.device)
    allowed = None if grammar is None else grammar.allowed
    if allowed is None:
        if vocab is None and scheme not in ("left", "auto"):
            raise GrammarError(f"init {scheme!r} needs vocab where the grammar allows every token")
        # Without a vocabulary, the first position of a text has nothing to copy, and takes token 0.
        allowed = slice(0, 1 if vocab is None else vocab)
    if isinstance(allowed, Tensor):
        random = grammar.allowed_ids[(uniforms * len(grammar.allowed_ids)).long()]
    else:
        random = allowed.start + (uniforms * (allowed.stop - allowed.start)).long()
    law: str | Tensor = "uniform" if scheme == "uniform" else "onehot"
    if scheme in ("random", "uniform"):
        tokens = random
    elif not has_grid:
        last = known.gather(1, (first_position - 1).clamp(min=0)[:, None])
        tokens = torch.where(first_position[:, None] > 0, last, random)
    else:
        source, anchor = _sources(first_position, position, grammar, scheme)
        if scheme in SAMPLED:
            if neighbour_probs is None:
                raise GrammarError(f"init {scheme!r} needs neighbour_probs, the distributions of the known cells")
            law = neighbour_probs(source)
            law = torch.where((source >= 0)[..., None], law, uniform_law(grammar.allowed, law, offset))
            tokens = inverse_cdf(law, uniforms) + offset
        else:
            copies = known.gather(1, source.clamp(min=0))
            fallback = random.gather(1, (anchor - first_position[:, None]).clamp(0, count - 1))
            tokens = torch.where(source >= 0, copies, fallback)
    if grammar is None:
        return tokens, law
    forced = grammar.forced(position)
    if isinstance(law, Tensor):
        column = (forced - offset).clamp(0, law.shape[-1] - 1)
        certain = torch.zeros_like(law).scatter_(-1, column[..., None], 1.0)
        law = torch.where((forced >= 0)[..., None], certain, law)
    return torch.where(forced >= 0, forced, tokens), law


def _sources(first: Tensor, position: Tensor, grammar: Any, scheme: str) -> tuple[Tensor, Tensor]:
    """The known position each cell copies, -1 for none, and the cell whose random token it then shares."""
    row, start, top, stride = grammar.neighbourhood(position)
    first = first[:, None]
    # Left: everything of one row that is being filled takes the last known token of that row.
    left = torch.where((start >= 0) & (start < first), first - 1, -1)
    if scheme in ("left", "left_sample"):
        return left, start
    # Above: as many rows up as it takes to leave what is being filled.
    rows_up = (position - first + stride) // stride.clamp(min=1)
    known_above = (start >= 0) & (rows_up <= row)
    above = torch.where(known_above, position - rows_up * stride, -1)
    if scheme != "auto":
        return above, top
    _, start_of_top, _, _ = grammar.neighbourhood(top)
    # What is no cell has no top either; its look-up stands for nothing.
    left_of_top = torch.where((start >= 0) & (start_of_top < first), first - 1, -1)
    return torch.where(known_above, above, left_of_top), start_of_top


def uniform_law(allowed: slice | Tensor | None, like: Tensor, offset: int = 0) -> Tensor:
    """The uniform distribution (V,) over the allowed tokens; the columns of `like` (..., V) begin at token `offset`."""
    columns = like.shape[-1]
    if isinstance(allowed, Tensor):
        law = allowed[offset : offset + columns].to(like)
    else:
        law = like.new_zeros(columns)
        inside = slice(0, columns) if allowed is None else slice(max(allowed.start - offset, 0), allowed.stop - offset)
        law[inside] = 1
    return law / law.sum()
