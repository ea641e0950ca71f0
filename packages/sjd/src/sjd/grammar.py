"""`ImageGrammar`: what may stand at each position of a generated image, as a function of the position alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from sjd.errors import GrammarError


class ImageGrammar:
    """The layout of the tokens that are generated: image cells in raster order, and tokens that are forced.

    Attributes:
        length: number of generated tokens.
        allowed: the tokens of the cells, a slice of the vocabulary or a (V,) bool tensor, or None for all.
        allowed_ids: the same tokens as int64, where they are given as a tensor.
        grids: (height, width) of each image, in the order of generation; empty for free text.
    """

    def __init__(
        self,
        grids: Sequence[tuple[int, int]],
        allowed: slice | Tensor | None,
        *,
        line_end: int | None = None,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
    ) -> None:
        """Lay out `before`, then each grid row by row with `line_end` behind every row, then `after`.

        Raises `GrammarError` for a grid without cells, or a slice that has a step, no end, or nothing in it.
        """
        for grid in grids:
            if len(grid) != 2 or min(grid) < 1:
                raise GrammarError(f"grid {tuple(grid)} is not valid: (height, width), each at least 1")
        if isinstance(allowed, slice):
            start, stop = allowed.start or 0, allowed.stop
            if allowed.step not in (None, 1) or stop is None or not 0 <= start < stop:
                raise GrammarError(f"allowed = {allowed} is not valid: slice(first, behind the last)")
            allowed = slice(start, stop)
        self.allowed = allowed
        self.allowed_ids = allowed.nonzero().squeeze(1) if isinstance(allowed, Tensor) else None
        self.grids = tuple((int(height), int(width)) for height, width in grids)
        # (forced id, row, column, start of the row, top of the column, distance to the cell above), -1 where there is
        # none
        table: list[tuple[int, ...]] = [(token, -1, -1, -1, -1, -1) for token in before]
        for height, width in self.grids:
            stride = width + (line_end is not None)
            first = len(table)
            for row in range(height):
                start = first + row * stride
                table += [(-1, row, column, start, first + column, stride) for column in range(width)]
                if line_end is not None:
                    table.append((line_end, -1, -1, -1, -1, -1))
        table += [(token, -1, -1, -1, -1, -1) for token in after]
        self._set(torch.tensor(table, dtype=torch.int64).reshape(-1, 6).T.contiguous())

    @classmethod
    def free(cls, length: int, allowed: slice | Tensor | None = None) -> ImageGrammar:
        """`length` tokens without a grid, such as text."""
        grammar = cls((), allowed)
        table = torch.full((6, length), -1, dtype=torch.int64)
        grammar._set(table)
        return grammar

    def _set(self, table: Tensor) -> None:
        self._table = table
        self.length = table.shape[1]
        # A free text has positions that are neither forced nor cells.
        self.has_grid = bool(self.grids)
        self.has_forced = bool((table[0] >= 0).any())

    def to(self, device: torch.device | str) -> ImageGrammar:
        """The same grammar with its tables on `device`."""
        if self._table.device == torch.device(device):
            return self
        other = object.__new__(ImageGrammar)
        other.allowed = self.allowed.to(device) if isinstance(self.allowed, Tensor) else self.allowed
        other.allowed_ids = None if self.allowed_ids is None else self.allowed_ids.to(device)
        other.grids = self.grids
        other._set(self._table.to(device))
        return other

    @overload
    def forced(self, position: int) -> int: ...
    @overload
    def forced(self, position: Tensor) -> Tensor: ...
    def forced(self, position: int | Tensor) -> int | Tensor:
        """The only token that may stand there, or -1; positions behind the end have none."""
        return self._look_up(0, position)

    @overload
    def row(self, position: int) -> int: ...
    @overload
    def row(self, position: Tensor) -> Tensor: ...
    def row(self, position: int | Tensor) -> int | Tensor:
        """The row of a cell within its grid, or -1."""
        return self._look_up(1, position)

    @overload
    def column(self, position: int) -> int: ...
    @overload
    def column(self, position: Tensor) -> Tensor: ...
    def column(self, position: int | Tensor) -> int | Tensor:
        """The column of a cell within its grid, or -1."""
        return self._look_up(2, position)

    def neighbourhood(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, start of the row, top of the column and distance to the cell above of positions (...,); -1 without."""
        found = self._table[:, position.clamp(0, self.length - 1)]
        return found[1], found[3], found[4], found[5]

    def cells(self, grid: int = -1) -> Tensor:
        """The positions (height * width,) of the cells of one grid, the last one unless told, in raster order."""
        if not self.has_grid:
            raise GrammarError("a text has no cells")
        index = range(len(self.grids))[grid]
        before = sum(height * width for height, width in self.grids[:index])
        height, width = self.grids[index]
        positions = (self._table[1] >= 0).nonzero().squeeze(1)
        return positions[before : before + height * width]

    def _look_up(self, which: int, position: int | Tensor) -> int | Tensor:
        if isinstance(position, Tensor):
            inside = (position >= 0) & (position < self.length)
            return torch.where(inside, self._table[which, position.clamp(0, self.length - 1)], -1)
        return int(self._table[which, position]) if 0 <= position < self.length else -1

    def __repr__(self) -> str:
        return f"ImageGrammar({self.length} tokens, grids {list(self.grids)})"
