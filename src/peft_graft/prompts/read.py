"""Sources of prompts: a file, a data set of the hub, or Python objects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from peft_graft.alignment.text import Source, first_row, shuffled, shuffled_rows, usual_columns
from peft_graft.errors import TextError
from peft_graft.prompts.conversation import FORMS, Prompt, no_prompt, prompts_of_row

PromptLike = str | Path | Iterable[Prompt | Mapping[str, Any] | str]


@dataclass(frozen=True)
class PromptSource(Source):
    """The prompts of a run (``PromptLike``): rows as for ``prompts_of_row``, in memory prompts and strings too.

    ``columns``: of the prompt, or of prompt and answer.
    """

    _dropped: list[int] = field(default_factory=lambda: [0, 0], repr=False, compare=False)

    @classmethod
    def of(cls, text: object, columns: Iterable[str] | None = None, seed: int = 0) -> PromptSource | None:
        """The source of prompts, None where it holds plain text; the first row says which.

        An iterator that can be read only once is taken for plain text, since looking at it would use it up.

        Raises:
            TextError: it cannot be read, or its first row is no good prompt.
        """
        chosen = tuple(columns) if columns is not None else None
        first = _first_row(text)
        if isinstance(first, Mapping):
            place = f"{text} first row" if isinstance(text, str | Path) else "given in memory row 1"
            return None if prompts_of_row(first, chosen, place) is None else cls(text, chosen, seed)
        return cls(text, chosen, seed) if isinstance(first, Prompt) else None

    @property
    def rows_without(self) -> int:
        """Rows of the last reading, as far as it went, that have no prompt."""
        return self._dropped[1]

    @property
    def dropped_duplicates(self) -> int:
        """Prompts left out of the last reading, as far as it went, since the same messages came before."""
        return self._dropped[0]

    def prompts(self) -> Iterator[Prompt]:
        """The prompts in random order, each once; the first is read at once, so that a bad source fails here.

        Raises:
            TextError: the source cannot be read, holds no prompts, or a row is in no known form.
        """
        found = self._unique()
        first = next(found, None)
        if first is None:
            raise TextError("there are no prompts", where=self.name, fix="give a source with at least a few hundred")
        return chain([first], found)

    def _unique(self) -> Iterator[Prompt]:
        seen = set[bytes]()
        self._dropped[:] = [0, 0]
        for place, row in self._rows():
            found = self._of_row(row, f"{self.name} {place}")
            self._dropped[1] += not found
            for prompt in found:
                digest = hashlib.blake2b(prompt.key.encode(), digest_size=16).digest()
                if digest in seen:
                    self._dropped[0] += 1
                else:
                    seen.add(digest)
                    yield prompt

    def _rows(self) -> Iterator[tuple[str, Prompt | Mapping[str, Any] | str]]:
        if isinstance(self.text, str | Path):
            return shuffled_rows(str(self.text), self.seed)
        return shuffled(((f"row {number}", row) for number, row in enumerate(self.text, start=1)), self.seed)

    def _of_row(self, row: Prompt | Mapping[str, Any] | str, where: str) -> list[Prompt]:
        if isinstance(row, Prompt):
            return [row]
        if isinstance(row, str):
            return [Prompt.of_text(row)] if row.strip() else []
        if not isinstance(row, Mapping):
            raise no_prompt(where, type(row).__name__)
        found = prompts_of_row(row, self.columns, where)
        if found is None:
            raise no_prompt(where, ", ".join(row))
        return found


def check_plain(text: object) -> None:
    """Refuse what is no source of prompts, where by the columns of its first row it is no plain text either.

    Raises:
        TextError: it is none.
    """
    row = _first_row(text)
    if isinstance(row, Mapping):
        where = str(text) if isinstance(text, str | Path) else "given in memory"
        fix = "name the prompt's column, or those of prompt and answer, with --columns"
        usual_columns(row, where, fix, before=f"{FORMS}; or, of plain text, ")


def _first_row(text: object) -> object:
    """The first row of a source that can be read again, None of any other and of lines of text."""
    if isinstance(text, str | Path):
        return None if Path(text).suffix.lower() == ".txt" else first_row(str(text))
    return None if not isinstance(text, Iterable) or isinstance(text, Iterator) else next(iter(text), None)
