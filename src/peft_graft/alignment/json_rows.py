"""Files of JSON rows: how they are laid out, and what is refused of them before a library reads them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from peft_graft.errors import TextError

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


def columns_of(source: str) -> dict[str, list[Any]] | None:
    """The columns of a .json file that is one object of them, as ``to_dict`` of datasets and pandas and ``to_json`` of
    pandas make it, or of questions in paragraphs, as SQuAD's own files are; None of any other.

    Lists, or objects by row number. Where all lists hold objects alone, it is one row with a conversation in it.

    Raises:
        TextError: they differ in length.
    """
    found = _only_object(source)
    if found and (questions := _questions_of(found.get("data"))):
        return {name: [row[name] for row in questions] for name in questions[0]}
    values = list(found.values()) if found else []
    if values and all(isinstance(value, dict) and value and all(map(str.isdecimal, value)) for value in values):
        numbers = sorted({number for value in values for number in value}, key=int)
        return {name: [value.get(number) for number in numbers] for name, value in found.items()}
    if not values or not all(isinstance(value, list) for value in values):
        return None
    if all(isinstance(one, dict) for value in values for one in value):
        return None
    if len({len(value) for value in values}) > 1:
        raise TextError(
            "the columns differ in length",
            where=source,
            expected="as many values in each as there are rows",
            found=", ".join(f"{len(value):,} of {name}" for name, value in found.items()),
            fix="fill the shorter ones up with null, or write one row a line, as .jsonl",
        )
    return found


def _questions_of(articles: Any) -> list[dict[str, Any]]:
    """The questions of articles in SQuAD's own form, with their paragraphs and answers; none of anything else."""
    try:
        return [
            {
                "question": asked["question"],
                "context": paragraph["context"],
                "answers": {name: [one[name] for one in asked.get("answers", [])] for name in ("text", "answer_start")},
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (TypeError, KeyError, AttributeError):
        return []


def _only_object(source: str) -> dict[str, Any]:
    """The object that a file of JSON holds, empty where it holds anything else, such as a row a line."""
    with Path(source).open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "")
        if not first.lstrip().startswith("{"):
            return {}
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            text = first + file.read()
        else:
            text = "" if any(line.strip() for line in file) else first
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # the reader of rows says what is wrong with it
        return {}
    return found if isinstance(found, dict) else {}


def digest_of(rows: Iterable[object]) -> str:
    """A hash of rows, as JSON, and of their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


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
