"""Cells of every row and every column of docs/matrix.md are found again; ``python tests/matrix.py`` tries them all."""

from __future__ import annotations

import pytest

import matrix
from conftest import needs_transformers4

pytestmark = needs_transformers4  # whose families and library of adapters the page speaks of
ARCHITECTURES = matrix.architectures()
WRITTEN = matrix.written()
CHOSEN = matrix.chosen(WRITTEN)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row(name: str) -> None:
    found = matrix.row(name, ARCHITECTURES[name], CHOSEN[name])
    assert found == {kind: WRITTEN[name][kind] for kind in found}


def test_what_is_tried_covers_rows_columns_and_outcomes() -> None:
    tried = {(name, kind) for name, kinds in CHOSEN.items() for kind in kinds}
    assert all(len(kinds) >= 4 for kinds in CHOSEN.values())
    assert all(sum(kind == each for _, each in tried) >= len(ARCHITECTURES) // 4 for kind in matrix.KINDS)
    outcomes = {(kind, outcome) for cells in WRITTEN.values() for kind, outcome in cells.items()}
    assert {(kind, WRITTEN[name][kind]) for name, kind in tried} == outcomes


def test_the_page_has_all_rows_and_columns() -> None:
    rows = WRITTEN
    assert rows.keys() == ARCHITECTURES.keys()
    assert len(rows) >= 25
    assert all(list(cells) == list(matrix.KINDS) for cells in rows.values())
    assert len(matrix.KINDS) >= 12
    assert matrix.page(rows) == matrix.PAGE.read_text()
