"""Names of a head's classes, in the order of its rows, and what its outputs are: as configurations and users say it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from peft_graft.errors import PlanError


class ProblemType(StrEnum):
    """What the outputs of a classifier of whole texts are, as configurations of transformers have it."""

    SINGLE_LABEL = "single_label_classification"
    MULTI_LABEL = "multi_label_classification"
    REGRESSION = "regression"

    @classmethod
    def declared(cls, value: object) -> ProblemType | None:
        """The ``problem_type`` of a configuration, None where it names none that is known."""
        return cls(value) if isinstance(value, str) and value in list(cls) else None


def are_numbers(problem_type: ProblemType | None, outputs: int | None) -> bool:
    """Whether a head of so many outputs gives numbers and decides nothing: where that is said, and where there is one,
    unless it is a label that holds or not."""
    single = outputs == 1 and problem_type is not ProblemType.MULTI_LABEL
    return problem_type is ProblemType.REGRESSION or single


#: What ``--labels`` says of the answers that come with the prompts of a language model.
ANSWERS = ("ignore", "use")
#: What transformers calls classes that nobody has named.
_PLACEHOLDER = re.compile(r"LABEL_\d+")
_EXPECTED = "names with commas between them, or a file: a JSON list or id2label, or one name in each line"


def declared_names(id2label: object) -> tuple[str, ...]:
    """Names from an ``id2label``, empty where it is none, or has transformers' placeholders only."""
    if not isinstance(id2label, Mapping):
        return ()
    try:
        numbered = {int(index): str(name) for index, name in id2label.items()}
    except (TypeError, ValueError, OverflowError):
        return ()
    names = tuple(numbered[index] for index in sorted(numbered))
    in_order = sorted(numbered) == list(range(len(names)))
    return () if not in_order or all(_PLACEHOLDER.fullmatch(name) for name in names) else names


def inverted(label2id: object) -> dict[Any, Any]:
    """The ``id2label`` of a ``label2id``, empty where it is none."""
    try:
        return {index: name for name, index in label2id.items()} if isinstance(label2id, Mapping) else {}
    except TypeError:
        return {}


def given_names(value: object) -> Any:
    """Names that a user gave with ``--labels``.

    Args:
        value: text with commas, a list, an id2label or label2id, or a file of names; ``ANSWERS`` are left as they are.

    Raises:
        PlanError: it is none of these, the file cannot be read, or a name is empty or comes twice.
    """
    if value is None:
        return value
    parts = str(value).split(",") if isinstance(value, str | Path) else value
    if isinstance(value, Mapping):
        parts = next((names for names in _tables(value) if names), None)
    if not isinstance(parts, list | tuple):
        raise PlanError(
            "this holds no labels in order",
            where="--labels",
            expected=_EXPECTED,
            found=value,
            fix='give a list in the order of the head\'s rows, or an id2label from 0 on: {0: "O", 1: "B-PER"}',
        )
    only = str(parts[0]).strip() if len(parts) == 1 else ""
    if only in ANSWERS:
        return only
    if only.endswith((".json", ".txt")) or (only and Path(only).is_file()):
        parts = _names_in(Path(only))
    names = tuple("" if part is None else str(part).strip() for part in parts)
    if not names or not all(names):
        raise PlanError("a label has no name", where="--labels", expected=_EXPECTED, found=", ".join(names) or "none")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PlanError("two labels have the same name", where="--labels", found=", ".join(twice))
    return names


#: What ``--labels`` takes.
Labels = Annotated[Literal["ignore", "use"] | tuple[str, ...], BeforeValidator(given_names)]


def _tables(found: object) -> Iterator[tuple[str, ...]]:
    """The names in an id2label or a label2id, or in a configuration that has one; empty where there are none."""
    if isinstance(found, Mapping):
        tables = (found, found.get("id2label"), inverted(found), inverted(found.get("label2id")))
        yield from map(declared_names, tables)


def _names_in(path: Path) -> Sequence[object]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return [line for line in text.splitlines() if line.strip()]
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlanError(
            f"the labels in {path} cannot be read ({reason})", where="--labels", fix=f"give {_EXPECTED}"
        ) from error
    if isinstance(found, list):
        return found
    names = next((names for names in _tables(found) if names), None)
    if names is None:
        raise PlanError(f"{path} holds no labels", where="--labels", expected=_EXPECTED)
    return names
