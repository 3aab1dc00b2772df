"""What results and settings are made of, and what is asked of files that others wrote."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from peft_graft.errors import CheckpointError


class Record(BaseModel):
    """Values with names, which do not change and among which none is unknown; as JSON in files."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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
