"""Labelled examples of classifiers and regressors, from files, data sets of the hub and rows in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_graft.alignment.text import load_rows, usual_columns
from peft_graft.errors import TextError
from peft_graft.labelled.scores import LabelKind
from peft_graft.models.tasks import Task

#: The usual column of words; those of their tags, of a text's class or all labels that hold, and of its number.
_WORDS, _TAGS, _CLASS = "tokens", ("ner_tags", "tags", "labels"), ("label", "labels")
_NUMBER = (*_CLASS, "score")
#: The usual columns of questions, of the texts that they are about, and of the answers.
_QUESTION, _ANSWERS = ("question", "context"), ("answers", "answer")
_NAME_THEM = "name those of the text and of the label with --columns text,label"
#: How the hub marks what has no label.
_UNLABELLED = -1


@dataclass(frozen=True)
class TaggedSentence:
    """Words and their tags."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The words as one text."""
        return (" ".join(self.tokens),)

    @property
    def labels(self) -> tuple[str, ...]:
        """The tags."""
        return self.tags


@dataclass(frozen=True)
class LabelledPair:
    """Two sentences and the label of what holds between them; or one sentence and its label."""

    first: str
    second: str | None
    label: str

    @property
    def texts(self) -> tuple[str, ...]:
        """The one or two texts."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label alone."""
        return (self.label,)


@dataclass(frozen=True)
class MultiLabelled:
    """One or two texts, and all labels that hold of them."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class LabelledNumber:
    """One or two texts, and the number that is theirs."""

    texts: tuple[str, ...]
    number: float

    @property
    def labels(self) -> tuple[float]:
        """The number alone."""
        return (self.number,)


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question, the text that it is about, and all answers in the text that are accepted; none where it has none.

    ``starts``: where each of these begins in the text, -1 where that is not said.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...] = ()

    @property
    def texts(self) -> tuple[str, str]:
        """The question and the text."""
        return self.question, self.context

    @property
    def labels(self) -> tuple[str, ...]:
        """The answers."""
        return self.answers

    @property
    def place(self) -> tuple[int, int] | None:
        """The characters [start, end) of the first answer in the text, None where there is none."""
        if not self.answers:
            return None
        answer, start = self.answers[0], self.starts[0] if self.starts else -1
        if start < 0 or self.context[start:][: len(answer)] != answer:  # not said, or counted in bytes or otherwise
            start = self.context.find(answer)
        return (start, start + len(answer)) if start >= 0 else None


LabelledExample = TaggedSentence | LabelledPair | MultiLabelled | LabelledNumber | AnsweredQuestion


class LabelledExamples(list[LabelledExample]):
    """Labelled examples, and how many rows of their source were left out, having no label."""

    def __init__(self, examples: Iterable[LabelledExample] = (), unlabelled: int = 0) -> None:
        super().__init__(examples)
        self.unlabelled = unlabelled


#: A file, a data set of the hub, or rows in memory.
LabelledLike = str | Path | Iterable[Mapping[str, Any]]


def read_examples(
    source: LabelledLike,
    kind: str,
    *,
    columns: Sequence[str] = (),
    label: str | None = None,
    labels: Sequence[str] = (),
    of: LabelKind = "samples",
) -> LabelledExamples:
    """The labelled rows of a source (names as for ``read_text``), in their order; those without a label are left out.

    Args:
        kind: ``token-classification``: a column of word lists (``tokens``) and one of tags (``ner_tags``, ``tags`` or
            ``labels``); ``sequence-classification``: one column of text or two, found by their usual names, and
            ``label`` or ``labels``, of numbers also ``score``; ``question-answering``: ``question``, ``context`` and
            ``answers``, as SQuAD has them, or lists of texts, or one text.
        columns, label: names of the columns, where they are not the usual ones.
        labels: names of numbered labels, where the source has none.
        of: what a text has: one class, any number of ``labels`` in a list, or whether each holds, as a Trainer takes
            them; or ``numbers``, one to each.

    Raises:
        TextError: the source cannot be read, lacks columns, has a number that no name stands for, something else in
            place of a number or of answers, or has as many tags as words nowhere.
    """
    where = str(source) if isinstance(source, str | Path) else "given in memory"
    rows, names, features = _rows(source, where)
    words, questions = kind == Task.TOKEN_CLASSIFICATION, kind == Task.QUESTION_ANSWERING
    ours = (_WORDS,) if words else _QUESTION if questions else ()
    found = tuple(columns) or ours or usual_columns(names, where, _NAME_THEM)
    usual = _TAGS if words else _ANSWERS if questions else _NUMBER if of == "numbers" else _CLASS
    label = label or next((name for name in usual if name in names), usual[0])
    if {*found, label} - set(names):
        wanted = ", ".join([*found, label])
        fix = _NAME_THEM.replace("text,label", "question,context,answers") if questions else _NAME_THEM
        raise TextError("columns are missing", where=where, expected=wanted, found=", ".join(names), fix=fix)
    name = _namer(features.get(label), labels, where)
    read = _Rows(found, label, name, where)
    numbered = list(enumerate(rows, start=1))
    if questions:
        return LabelledExamples(read.question(row, number) for number, row in numbered)
    labelled = [(number, row) for number, row in numbered if not _is_missing(row[label], of)]
    without = len(numbered) - len(labelled)
    if words:
        return LabelledExamples((read.tagged(row, number) for number, row in labelled if row[found[0]]), without)
    if of == "numbers":
        return LabelledExamples((read.number(row, number) for number, row in labelled), without)
    if of == "labels":
        flags = labels if _are_flags([row[label] for _, row in labelled], labels) else ()
        return LabelledExamples((read.multi_labelled(row, flags) for _, row in labelled), without)
    return LabelledExamples((read.pair(row) for _, row in labelled), without)


def _is_missing(value: object, of: LabelKind) -> bool:
    """Whether a row has no label: None, NaN as tables have it, or the hub's mark, which is a number like others."""
    if isinstance(value, float) and math.isnan(value):
        return True
    return value is None or (of != "numbers" and isinstance(value, int | float) and value == _UNLABELLED)


@dataclass(frozen=True)
class _Rows:
    """How a row becomes an example: by which columns, and by what name its label goes."""

    columns: Sequence[str]
    label: str
    name: Callable[[Any], str]
    where: str

    def tagged(self, row: Mapping[str, Any], number: int) -> TaggedSentence:
        tokens, tags = row[self.columns[0]], row[self.label]
        if not all(isinstance(value, list | tuple) for value in (tokens, tags)) or len(tokens) != len(tags):
            raise TextError(
                "words and tags do not belong together",
                where=f"{self.where} row {number}",
                expected=f"lists of the same length in {self.columns[0]} and {self.label}",
                found=" and ".join(
                    f"{len(value)}" if isinstance(value, list | tuple) else type(value).__name__
                    for value in (tokens, tags)
                ),
                fix='give rows like {"tokens": ["Ada", "wrote"], "ner_tags": ["B-PER", "O"]}',
            )
        return TaggedSentence(tuple(map(str, tokens)), tuple(map(self.name, tags)))

    def pair(self, row: Mapping[str, Any]) -> LabelledPair:
        first, second = [*self._texts(row), None][:2]
        assert first is not None
        return LabelledPair(first, second, self.name(row[self.label]))

    def number(self, row: Mapping[str, Any], number: int) -> LabelledNumber:
        try:
            found = float(row[self.label])
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise TextError(
                "this is no number",
                where=f"{self.where} row {number}",
                expected=f"a number in {self.label}, as the module gives",
                found=repr(row[self.label]),
                fix="name the column of numbers last with --columns text,score",
            )
        return LabelledNumber(self._texts(row), found)

    def question(self, row: Mapping[str, Any], number: int) -> AnsweredQuestion:
        given: Any = row[self.label]
        starts: Any = None
        if isinstance(given, Mapping):
            starts, given = given.get("answer_start"), given.get("text", given)
        elif isinstance(given, list | tuple) and given and all(isinstance(one, Mapping) for one in given):
            given, starts = ([one.get(name) for one in given] for name in ("text", "answer_start"))
        answers = [given] if isinstance(given, str) else [] if given is None else given
        if isinstance(given, str) and given.startswith("{") and "answer_start" in given:  # as pandas writes tables
            answers = None
        if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
            raise TextError(
                "these are no answers",
                where=f"{self.where} row {number}",
                expected=f'{{"text": [...], "answer_start": [...]}}, texts or one text in {self.label}',
                found=f"an object as text: {given[:40]}" if answers is None else type(row[self.label]).__name__,
                fix="give rows of .jsonl or .parquet, or name the columns with --columns question,context,answers",
            )
        starts = [*starts] if isinstance(starts, list | tuple) else [starts]
        starts = [start if isinstance(start, int) else -1 for start in [*starts, *[None] * len(answers)]]
        # Some files have an empty one for none.
        accepted = [one for one in zip(answers, starts, strict=False) if one[0].strip()]
        question, context = self._texts(row)
        return AnsweredQuestion(
            question, context, tuple(answer for answer, _ in accepted), tuple(start for _, start in accepted)
        )

    def multi_labelled(self, row: Mapping[str, Any], flags: Sequence[str] = ()) -> MultiLabelled:
        given = row[self.label]
        if flags:
            return MultiLabelled(
                self._texts(row), tuple(name for name, holds in zip(flags, given, strict=True) if holds)
            )
        return MultiLabelled(
            self._texts(row), tuple(map(self.name, [given] if isinstance(given, str | int) else given))
        )

    def _texts(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[column] or "") for column in self.columns)


def _rows(source: LabelledLike, where: str) -> tuple[Iterable[Mapping[str, Any]], Sequence[str], Mapping[str, Any]]:
    """Rows, the names of their columns, and what ``datasets`` knows of these."""
    if isinstance(source, str | Path):
        loaded = load_rows(str(source))
        return loaded, loaded.column_names, loaded.features
    rows = list(source)
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        odd = next((type(row).__name__ for row in rows if not isinstance(row, Mapping)), "nothing")
        raise TextError("these are no labelled rows", where=where, expected="dictionaries by column", found=odd)
    return rows, list(rows[0]), getattr(source, "features", None) or {}


def _are_flags(values: Sequence[Any], labels: Sequence[str]) -> bool:
    """Whether every row says of each label whether it holds, by 0 and 1, and does not name those that do."""
    return bool(labels) and all(
        isinstance(value, list | tuple) and len(value) == len(labels) and set(value) <= {0, 1} for value in values
    )


def _namer(feature: Any, labels: Sequence[str], where: str) -> Callable[[Any], str]:
    """A function from what a label column holds to a label's name."""
    inner = getattr(feature, "feature", feature)
    if hasattr(inner, "int2str"):
        to_name: Callable[[Any], str] = inner.int2str
        return to_name
    if not labels:
        return str

    def name(value: Any) -> str:
        whole = isinstance(value, float) and value.is_integer()  # as tables have numbers where one is missing
        if whole or (isinstance(value, str) and value.isascii() and value.isdigit() and value not in labels):
            value = int(value)
        if isinstance(value, int):
            if not 0 <= value < len(labels):
                known = f"0 to {len(labels) - 1}"
                raise TextError("a label has no name", where=where, expected=known, found=value)
            return labels[value]
        return str(value)

    return name
