"""The labelled examples of a task, from files and data sets of the hub."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft_graft.alignment.text import load_rows
from peft_graft.errors import TextError
from peft_graft.labelled.examples import AnsweredQuestion, LabelledPair, TaggedSentence, read_examples
from peft_graft.models.tasks import Task
from peft_graft.prompts.conversation import Prompt, prompts_of_row
from peft_graft.study.answering import AnsweringTask
from peft_graft.study.generation import generation_task
from peft_graft.study.ner import tag_names
from peft_graft.study.spec import GenerationSpec, SomeTask
from peft_graft.study.tasks import Example, StudyTask

logger = logging.getLogger("peft_graft")
#: Seed of the order in which training examples are taken.
_ORDER = 0


@lru_cache(maxsize=4)
def read_task(
    name: str, spec: SomeTask, language: str
) -> tuple[StudyTask, list[Example], list[Example], list[Example]]:
    """The task and its training, validation and test examples in one language.

    Raises:
        TextError: see ``read_examples`` and ``read_prompts``.
    """

    train, validation = _read_labelled(spec, language)
    train, test = train[: spec.train_examples], _read(spec.test, spec, language)[: spec.test_examples]
    if isinstance(spec, GenerationSpec):
        options = spec.model_dump(include=set(spec.ASKING))
        return generation_task(name, spec.metric, **options), train, validation, test
    if spec.kind == Task.QUESTION_ANSWERING:
        return AnsweringTask(name, spec.kind, (), spec.metric), train, validation, test
    everything = [*train, *validation, *test]
    if spec.labels:
        labels = spec.labels
    elif spec.kind == Task.TOKEN_CLASSIFICATION:
        labels = tag_names([example for example in everything if isinstance(example, TaggedSentence)])
    else:
        labels = tuple(sorted({example.label for example in everything if isinstance(example, LabelledPair)}))
    return StudyTask(name, spec.kind, labels, spec.metric), train, validation, test


def read_unlabelled(spec: SomeTask, language: str) -> list[Example]:
    """The examples whose text grafts are made on.

    Raises:
        TextError: see ``read_task``; or there are none beyond the training examples.
    """
    train, _ = _read_labelled(spec, language)
    if spec.unlabelled_examples is None:
        return train[: spec.train_examples]
    start = spec.train_examples or 0
    seen = {_text_of(example) for example in train[:start]}
    found = [example for example in train[start:] if _text_of(example) not in seen]
    if not found:
        raise TextError(
            "there are no texts beyond the training examples",
            where=spec.train.format(language=language),
            expected=f"more than train_examples = {start}",
            found=len(train),
            fix="lower train_examples, or leave unlabelled_examples out",
        )
    if len(found) < spec.unlabelled_examples:
        logger.warning(
            "%s: %d texts come after the %d training examples, fewer than the %d that grafts are to be made on",
            spec.train.format(language=language),
            len(found),
            start,
            spec.unlabelled_examples,
        )
    return list(found[: spec.unlabelled_examples])


def _text_of(example: Example) -> str | tuple[str, ...]:
    """What two examples have in common that a model cannot tell apart."""
    return example.text if isinstance(example, Prompt) else example.texts


@lru_cache(maxsize=4)
def _read_labelled(spec: SomeTask, language: str) -> tuple[list[Example], list[Example]]:
    """All training examples in the order in which they are taken, and the validation examples."""
    train = _read(spec.train, spec, language)
    random.Random(_ORDER).shuffle(train)
    if spec.validation:
        return train, _read(spec.validation, spec, language)[: spec.validation_examples]
    cut = max(len(train) // 2, len(train) - spec.validation_examples)
    return train[:cut], train[cut:]


def _read(source: str, spec: SomeTask, language: str) -> list[Example]:
    place = source.format(language=language)
    if isinstance(spec, GenerationSpec):
        return list(read_prompts(place, spec.columns))
    found = read_examples(place, spec.kind, columns=spec.columns, label=spec.label, labels=spec.labels)
    return [example for example in found if isinstance(example, TaggedSentence | LabelledPair | AnsweredQuestion)]


def read_prompts(source: str, columns: Sequence[str] = ()) -> list[Prompt]:
    """The prompts of a file or a data set of the hub, each with an answer, in their order.

    Args:
        columns: of the prompt and of the answer; ``prompt`` and ``completion``, or the other forms of
            ``prompts_of_row``, when not given. The column of the answer may hold a list, of all answers that are
            accepted, or be missing where there is one called ``references``.

    Raises:
        TextError: the source cannot be read, holds no prompts, lacks columns, or a prompt has no answer.
    """
    found: list[Prompt] = []
    for number, row in enumerate(load_rows(source), start=1):
        where = f"{source} row {number}"
        prompts = prompts_of_row(*_with_references(row, columns), where)
        if prompts is None:
            raise TextError("there is no prompt", where=where, expected="prompt and completion", found=", ".join(row))
        if not all(prompt.references for prompt in prompts):
            expected = " or ".join([*columns[1:], "references"]) if columns else "completion or references"
            raise TextError("a prompt has no answer", where=where, expected=expected, found=", ".join(row))
        found += prompts
    if not found:
        raise TextError("there are no prompts", where=source)
    return found


def _with_references(row: dict[str, Any], columns: Sequence[str]) -> tuple[dict[str, Any], Sequence[str]]:
    """A row and its columns, where an answer that is a list of texts is called references."""
    if len(columns) != 2:
        return row, columns
    prompt, answer = columns
    given = row.get(answer)
    if isinstance(given, list) and all(isinstance(one, str) for one in given):
        return {prompt: row.get(prompt), "references": given}, (prompt,)
    return row, (prompt,) if answer not in row and "references" in row else columns


def text_file(examples: list[Example], path: Path) -> None:
    """Write the examples without their labels and answers, for ``transfer --text``."""
    rows: list[dict[str, Any]] = []
    for example in examples:
        if isinstance(example, Prompt):
            turns = [{"role": message.role, "content": message.content} for message in example.messages]
            rows.append({"prompt": example.text if [turn["role"] for turn in turns] == ["user"] else turns})
        elif isinstance(example, TaggedSentence):
            rows.append({"text": " ".join(example.tokens)})
        elif isinstance(example, AnsweredQuestion):
            rows.append({"question": example.question, "context": example.context})
        elif example.second is None:
            rows.append({"text": example.first})
        else:
            rows.append({"premise": example.first, "hypothesis": example.second})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
