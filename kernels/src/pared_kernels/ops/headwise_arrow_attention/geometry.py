"""Which blocks of the attention matrix an arrow needs: a band over the picture, and everything that touches text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FULL, SKIP = -1, 0
"""Windows of a head that attends to everything and of one that is not computed; above: half width of its band."""


class Arrow(NamedTuple):
    """One head's pattern over `num_text + num_vision` tokens: pair (i, j) is kept iff |i - j| <= `window`, or i or j is
    text (DiTFastAttnV2, arXiv 2503.22796, section 3.1). `window` FULL keeps all."""

    num_vision: int
    num_text: int
    window: int
    text_first: bool

    @property
    def tokens(self) -> int:
        return self.num_vision + self.num_text

    @property
    def text(self) -> range:
        """Positions of the text tokens."""
        start = 0 if self.text_first else self.num_vision
        return range(start, start + self.num_text)

    @property
    def vision(self) -> range:
        """Positions of the picture's tokens."""
        start = self.num_text if self.text_first else 0
        return range(start, start + self.num_vision)

    def keeps(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Bool (rows, columns): the kept pairs among these positions, both int64 of one dimension."""
        if self.window == FULL:
            return torch.ones(len(rows), len(columns), dtype=torch.bool, device=rows.device)
        is_text = [(one >= self.text.start) & (one < self.text.stop) for one in (rows, columns)]
        near = (rows[:, None] - columns[None, :]).abs() <= self.window
        return near | is_text[0][:, None] | is_text[1][None, :]


class Visits(NamedTuple):
    """Half-open ranges of column blocks that a row block visits: of the band, and of those that touch text."""

    band: range
    text: range


def visits(arrow: Arrow, row_block: int, block: tuple[int, int]) -> Visits:
    """Return the smallest cover of the pairs that `arrow` keeps in this row block, with column blocks of `block[1]`.

    A row block that touches text visits everything, as every block does with window FULL.
    """
    rows, columns = block
    first, end = row_block * rows, min((row_block + 1) * rows, arrow.tokens)
    num_columns = -(-arrow.tokens // columns)
    text = range(num_columns, num_columns)
    if arrow.num_text:
        text = range(arrow.text.start // columns, -(-arrow.text.stop // columns))
    rest = range(text.stop, num_columns) if arrow.text_first and arrow.num_text else range(text.start)
    touches_text = arrow.num_text > 0 and first < arrow.text.stop and end > arrow.text.start
    if arrow.window == FULL or touches_text:
        return Visits(rest, text)
    low = max(arrow.vision.start, first - arrow.window) // columns
    high = -(-min(arrow.vision.stop, end + arrow.window) // columns)
    start = max(rest.start, low)
    return Visits(range(start, max(start, min(rest.stop, high))), text)


def block_map(arrow: Arrow, block: tuple[int, int]) -> Tensor:
    """Bool (row blocks, column blocks) on the CPU: the visited ones."""
    rows, columns = (-(-arrow.tokens // size) for size in block)
    result = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        for part in visits(arrow, row, block):
            result[row, part.start : part.stop] = True
    return result


def visited_pairs(arrow: Arrow, block: tuple[int, int] | None) -> int:
    """Number of the (query, key) pairs computed: those of the visited blocks, or without `block` exactly those kept."""
    tokens, vision, text = arrow.tokens, arrow.num_vision, arrow.num_text
    if arrow.window == FULL:
        return tokens * tokens
    if block is None:
        # A band of half width w in a square of side V: each diagonal at distance d has V - d entries.
        reach = min(arrow.window, vision - 1)
        return vision * (2 * reach + 1) - reach * (reach + 1) + 2 * vision * text + text * text
    pairs = 0
    for row in range(-(-tokens // block[0])):
        height = min((row + 1) * block[0], tokens) - row * block[0]
        for part in visits(arrow, row, block):
            pairs += height * (min(part.stop * block[1], tokens) - min(part.start * block[1], tokens))
    return pairs
