"""What may stand where."""

from __future__ import annotations

import pytest
import torch
from sjd import ImageGrammar, lumina_grammar
from sjd.errors import GrammarError


def test_rows_end_with_a_line_end_and_the_image_with_its_end():
    grammar = lumina_grammar(2, 4)
    forced = [grammar.forced(i) for i in range(grammar.length)]
    assert forced == [8197, 8805, 8806, -1, -1, -1, -1, 8803, -1, -1, -1, -1, 8803, 8196]
    assert [grammar.row(i) for i in (2, 3, 7, 8, 13)] == [-1, 0, -1, 1, -1]
    assert [grammar.column(i) for i in (3, 6, 7, 11)] == [0, 3, -1, 3]
    assert grammar.allowed == slice(4, 8196)
    assert grammar.cells().tolist() == [3, 4, 5, 6, 8, 9, 10, 11]


def test_several_grids_follow_each_other():
    grammar = ImageGrammar([(1, 2), (2, 3)], slice(0, 9), after=(31,))
    assert grammar.length == 9
    assert [grammar.row(i) for i in range(9)] == [0, 0, 0, 0, 0, 1, 1, 1, -1]
    assert grammar.cells().tolist() == [2, 3, 4, 5, 6, 7]
    assert grammar.cells(0).tolist() == [0, 1]


def test_positions_behind_the_end_have_nothing():
    grammar = ImageGrammar([(1, 2)], slice(0, 9), after=(31,))
    assert grammar.forced(3) == grammar.row(-1) == -1
    assert grammar.forced(torch.tensor([1, 2, 3, 50])).tolist() == [-1, 31, -1, -1]


def test_text_has_neither_cells_nor_forced_tokens():
    grammar = ImageGrammar.free(5)
    assert (grammar.length, grammar.has_grid, grammar.forced(2), grammar.row(2)) == (5, False, -1, -1)
    with pytest.raises(GrammarError, match="cells"):
        grammar.cells()


@pytest.mark.parametrize("arguments", [([(0, 3)], slice(0, 4)), ([(2, 2)], slice(4, 4)), ([(2, 2)], slice(0, None)),
                                       ([(2, 2)], slice(0, 8, 2))])  # fmt: skip
def test_wrong_grids_and_slices_are_refused(arguments):
    with pytest.raises(GrammarError, match="not valid"):
        ImageGrammar(*arguments)
