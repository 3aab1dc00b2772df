"""Every cell of docs/matrix.md is found again."""

from __future__ import annotations

import pytest

import matrix
from conftest import needs_transformers4

pytestmark = needs_transformers4  # whose families and library of adapters the page speaks of
ARCHITECTURES = matrix.architectures()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row(name: str) -> None:
    found, written = matrix.row(name, ARCHITECTURES[name]), matrix.written()[name]
    assert found == {kind: written[kind] for kind in found}


def test_the_page_has_all_rows_and_columns() -> None:
    rows = matrix.written()
    assert rows.keys() == ARCHITECTURES.keys()
    assert len(rows) >= 25
    assert all(list(cells) == list(matrix.KINDS) for cells in rows.values())
    assert len(matrix.KINDS) >= 12
    assert matrix.page(rows) == matrix.PAGE.read_text()
