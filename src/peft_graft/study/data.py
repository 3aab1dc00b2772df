"""The labelled examples of a study's tasks."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path

from peft_graft.models.tasks import Task
from peft_graft.study.examples import read_examples
from peft_graft.study.ner import TaggedSentence, tag_names
from peft_graft.study.spec import TaskSpec
from peft_graft.study.tasks import Example, LabelledPair, StudyTask

#: Seed of the order in which training examples are taken.
_ORDER = 0


@lru_cache(maxsize=4)
def read_task(
    name: str, spec: TaskSpec, language: str
) -> tuple[StudyTask, list[Example], list[Example], list[Example]]:
    """The task and its training, validation and test examples in one language.

    Raises:
        TextError: see ``read_examples``.
    """

    def read(source: str) -> list[Example]:
        place = source.format(language=language)
        return read_examples(place, spec.kind, columns=spec.columns, label=spec.label, labels=spec.labels)

    train = read(spec.train)
    random.Random(_ORDER).shuffle(train)
    if spec.validation:
        validation = read(spec.validation)[: spec.validation_examples]
    else:
        cut = max(len(train) // 2, len(train) - spec.validation_examples)
        train, validation = train[:cut], train[cut:]
    train, test = train[: spec.train_examples], read(spec.test)[: spec.test_examples]
    everything = [*train, *validation, *test]
    if spec.labels:
        labels = spec.labels
    elif spec.kind == Task.TOKEN_CLASSIFICATION:
        labels = tag_names([example for example in everything if isinstance(example, TaggedSentence)])
    else:
        labels = tuple(sorted({example.label for example in everything if isinstance(example, LabelledPair)}))
    return StudyTask(name, spec.kind, labels, spec.metric), train, validation, test


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
