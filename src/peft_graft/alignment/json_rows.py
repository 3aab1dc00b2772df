"""Files of JSON rows: how they are laid out, and what is refused of them before a library reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

#: How deep a row of JSON may be nested, at which pyarrow ends the process at some ten thousand, and how many columns
#: it may have.
_DEEPEST = 500
_WIDEST = 1000
#: What begins with null, also in a list of rows.
_NULL_FIRST = re.compile(r"\s*(?:\[\s*)?null\b")
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')


def has_a_row_a_line(source: str) -> bool:
    """Whether a .jsonl file is what its name says, and not one array over many lines."""
    return not _first_line(source).startswith("[")


def check_json(source: str) -> None:
    """Refuse what ends the process in pyarrow: values that are none of JSON's, rows that are nested without end, null
    in the place of the first row; and rows so wide that ``datasets``, which takes the square of that in time, hardly
    ends.

    Raises:
        ValueError: there is one, or no JSON.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no value of JSON")

    is_first = True
    with Path(source).open(encoding="utf-8-sig") as file:
        for text in file if has_a_row_a_line(source) and not _is_spread(source) else [file.read()]:
            if is_first and text.strip():
                is_first = False
                if _NULL_FIRST.match(text):
                    raise ValueError("the first row is null")
            if "Infinity" in text or "NaN" in text:
                json.loads(text, parse_constant=refuse)
            if _depth(text) > _DEEPEST and _depth(_STRINGS.sub("", text)) > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} deep")
            if (
                text.lstrip().startswith("{")
                and text.count('":') > _WIDEST
                and (width := len(json.loads(text))) > _WIDEST
            ):
                raise ValueError(f"a row has {width:,} columns")


def _is_spread(source: str) -> bool:
    """Whether a file of JSON is one object over many lines."""
    return _first_line(source) == "{"


def _first_line(source: str) -> str:
    """The first line that is not blank, empty where there is none."""
    with Path(source).open(encoding="utf-8-sig") as file:
        return next((line.strip() for line in file if line.strip()), "")


def _depth(text: str) -> int:
    """How deep JSON is nested, or more, where brackets stand in its strings."""
    if len(text) <= _DEEPEST:
        return 0
    signs = np.frombuffer(text.encode(), dtype=np.uint8)
    opening, closing = np.isin(signs, [ord("["), ord("{")]), np.isin(signs, [ord("]"), ord("}")])
    steps = np.where(opening, 1, -1)[opening | closing]
    return int(steps.cumsum().max(initial=0))
