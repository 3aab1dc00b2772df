"""Reading labelled examples from files and the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft_graft.alignment.text import KNOWN_COLUMNS, load_rows
from peft_graft.errors import TextError
from peft_graft.models.tasks import Task
from peft_graft.study.ner import TaggedSentence
from peft_graft.study.tasks import Example, LabelledPair


def read_examples(
    source: str,
    kind: str,
    *,
    columns: Sequence[str] = (),
    label: str | None = None,
    labels: Sequence[str] = (),
) -> list[Example]:
    """The labelled rows of a file or a data set of the hub (names as for ``read_text``), in their order.

    Args:
        kind: ``token-classification``: a column of word lists (``tokens``) and one of IOB2 tags (``ner_tags``);
            ``sequence-classification``: one column of text or two, found by their usual names, and ``label``.
        columns, label: names of the columns, where they are not the usual ones.
        labels: names of numbered labels, where the source has none.

    Raises:
        TextError: the source cannot be read, lacks columns, or has a number that no name stands for.
    """
    rows = load_rows(source)
    found = tuple(columns) or _usual_columns(kind, rows.column_names, source)
    label = label or ("ner_tags" if kind == Task.TOKEN_CLASSIFICATION else "label")
    if {*found, label} - set(rows.column_names):
        wanted = ", ".join([*found, label])
        raise TextError("columns are missing", where=source, expected=wanted, found=", ".join(rows.column_names))
    name = _namer(rows.features[label], labels, source)
    if kind == Task.TOKEN_CLASSIFICATION:
        return [TaggedSentence(tuple(row[found[0]]), tuple(map(name, row[label]))) for row in rows if row[found[0]]]
    second = found[1] if len(found) > 1 else None
    return [
        LabelledPair(row[found[0]], row[second] if second else None, name(row[label]))
        for row in rows
        if row[label] is not None and row[label] != -1  # how the hub marks what has no label
    ]


def _usual_columns(kind: str, names: Sequence[str], source: str) -> tuple[str, ...]:
    if kind == Task.TOKEN_CLASSIFICATION:
        return ("tokens",)
    for known in KNOWN_COLUMNS:
        if set(known) <= set(names):
            return known
    raise TextError("no column of text with a usual name", where=source, found=", ".join(names), fix="name columns")


def _namer(feature: Any, labels: Sequence[str], source: str) -> Callable[[Any], str]:
    """A function from what a label column holds to a label's name."""
    inner = getattr(feature, "feature", feature)
    if hasattr(inner, "int2str"):
        to_name: Callable[[Any], str] = inner.int2str
        return to_name
    if not labels:
        return str

    def name(value: Any) -> str:
        if isinstance(value, int):
            if not 0 <= value < len(labels):
                known = f"0 to {len(labels) - 1}"
                raise TextError("a label has no name", where=source, expected=known, found=value)
            return labels[value]
        return str(value)

    return name
