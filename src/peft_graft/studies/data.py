"""The labelled examples of a study's tasks, from files or the hub."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft_graft.architectures import TOKEN_CLASSIFICATION
from peft_graft.errors import TextError
from peft_graft.experiments.ner import TaggedSentence, tag_names
from peft_graft.experiments.tasks import Example, LabelledPair, Task
from peft_graft.studies.spec import TaskSpec
from peft_graft.text import KNOWN_COLUMNS, load_rows

#: Seed of the order in which training examples are taken.
_ORDER = 0


@lru_cache(maxsize=4)
def read_task(name: str, spec: TaskSpec, language: str) -> tuple[Task, list[Example], list[Example], list[Example]]:
    """The task and its training, validation and test examples in one language.

    Raises:
        TextError: a source cannot be read, lacks columns, or has labels without names that are not numbers of any.
    """
    train = _examples(spec, spec.train, language)
    random.Random(_ORDER).shuffle(train)
    if spec.validation:
        validation = _examples(spec, spec.validation, language)[: spec.validation_examples]
    else:
        cut = max(len(train) // 2, len(train) - spec.validation_examples)
        train, validation = train[:cut], train[cut:]
    train = train[: spec.train_examples]
    test = _examples(spec, spec.test, language)[: spec.test_examples]
    everything = [*train, *validation, *test]
    if spec.kind == TOKEN_CLASSIFICATION:
        labels = tag_names([example for example in everything if isinstance(example, TaggedSentence)])
    else:
        labels = tuple(sorted({example.label for example in everything if isinstance(example, LabelledPair)}))
    if spec.labels:
        labels = spec.labels
    return Task(name, spec.kind, labels, spec.metric), train, validation, test


def _examples(spec: TaskSpec, source: str, language: str) -> list[Example]:
    source = source.format(language=language)
    rows = load_rows(source)
    columns = spec.columns or _usual_columns(spec.kind, rows.column_names, source)
    label = spec.label or ("ner_tags" if spec.kind == TOKEN_CLASSIFICATION else "label")
    missing = {*columns, label} - set(rows.column_names)
    if missing:
        raise TextError(
            "columns are missing",
            where=source,
            expected=", ".join([*columns, label]),
            found=", ".join(rows.column_names),
        )
    name = _namer(spec, rows.features[label], source)
    if spec.kind == TOKEN_CLASSIFICATION:
        return [TaggedSentence(tuple(row[columns[0]]), tuple(map(name, row[label]))) for row in rows if row[columns[0]]]
    second = columns[1] if len(columns) > 1 else None
    return [
        LabelledPair(row[columns[0]], row[second] if second else None, name(row[label]))
        for row in rows
        if row[label] is not None and row[label] != -1  # unlabelled, as the hub marks it
    ]


def _usual_columns(kind: str, names: list[str], source: str) -> tuple[str, ...]:
    if kind == TOKEN_CLASSIFICATION:
        return ("tokens",)
    for known in KNOWN_COLUMNS:
        if set(known) <= set(names):
            return known
    raise TextError("no column of text with a usual name", where=source, found=", ".join(names), fix="name columns")


def _namer(spec: TaskSpec, feature: Any, source: str) -> Any:
    """A function from what a label column holds to a label's name."""
    inner = getattr(feature, "feature", feature)
    if hasattr(inner, "int2str"):
        return inner.int2str
    if not spec.labels:
        return str

    def name(value: Any) -> str:
        if isinstance(value, int):
            if not 0 <= value < len(spec.labels):
                raise TextError(
                    "a label has no name", where=source, expected=f"0 to {len(spec.labels) - 1}", found=value
                )
            return spec.labels[value]
        return str(value)

    return name


def text_file(examples: list[Example], path: Path) -> None:
    """Write the examples without their labels, for ``transfer --text``."""
    rows = []
    for example in examples:
        if isinstance(example, TaggedSentence):
            rows.append({"text": " ".join(example.tokens)})
        elif example.second is None:
            rows.append({"text": example.first})
        else:
            rows.append({"premise": example.first, "hypothesis": example.second})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
