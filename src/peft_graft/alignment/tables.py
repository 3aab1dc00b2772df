"""Tables of pandas as rows of plain values, as files and ``datasets`` have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def rows_of_table(table: Any) -> list[dict[str, Any]]:
    """The rows of a ``pandas.DataFrame``: what is missing in it, such as NaN, is None, and arrays are lists."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{name: _without_arrays(value) for name, value in row.items()} for row in rows]


def _without_arrays(value: Any) -> Any:
    """A cell with lists in place of the arrays that pandas reads them as."""
    if isinstance(value, Mapping):
        return {name: _without_arrays(one) for name, one in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_without_arrays(one) for one in value] if isinstance(value, list) else value
