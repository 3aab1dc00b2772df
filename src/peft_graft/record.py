"""What results and settings are made of, and what is asked of files that others wrote."""

from __future__ import annotations

import html
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from peft_graft.errors import CheckpointError, plain

#: What a prompt or a notebook shows of a value: its beginning and its end.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80
_CELL = 300  # letters of a cell


class Record(BaseModel):
    """Values with names, which do not change and among which none is unknown; as JSON in files.

    A prompt and a notebook show them cut short; ``model_dump`` has them whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, _Shown(_SHORT.repr(value))) for name, value in super().__repr_args__()]

    def _repr_html_(self) -> str:
        return html_table(type(self).__name__, [(name or "", value) for name, value in self.__repr_args__()])


class _Shown(str):
    """Text that stands for a value, in a repr as it is."""

    def __repr__(self) -> str:
        return str(self)


def html_table(title: str, rows: Iterable[Sequence[object]]) -> str:
    """A table for notebooks, its first column in bold; every text is shown as it reads, cut where it is long."""

    def cell(value: object) -> str:
        text = plain(str(value))
        return html.escape(text if len(text) <= _CELL else f"{text[:_CELL]}…")

    lines = (
        "".join(f"<td>{f'<b>{cell(value)}</b>' if index == 0 else cell(value)}</td>" for index, value in enumerate(row))
        for row in rows
    )
    return f"<table><caption>{cell(title)}</caption>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


class Stored(BaseModel):
    """What a file of another program has to hold, as far as it is looked at; all else in it passes."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    @classmethod
    def of(cls, content: Any, where: str) -> Self:
        """The values of a file's content.

        Raises:
            CheckpointError: one is missing, or of another type; the first that is.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"] if not _BRANCHES.fullmatch(str(part)))
            raise CheckpointError(
                f"{place} is missing" if first["type"] == "missing" else f"{place} has a value that means nothing here",
                where=where,
                expected=None if first["type"] == "missing" else first["msg"].removeprefix("Input should be "),
                found=None if first["type"] == "missing" else repr(first["input"]),
                fix="correct it, or copy the checkpoint again from where it was saved",
            ) from error


#: What pydantic adds to the place of a value that may be of several types.
_BRANCHES = re.compile(r"str|int|float|bool|(constrained-|list\[|dict\[).*")
