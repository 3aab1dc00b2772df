"""Classifiers, regressors and answerers side by side: the same labelled text put to each, and what they say scored."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from peft_graft.alignment.activations import tokenize
from peft_graft.alignment.text import Sample
from peft_graft.alignment.tokens import Span
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import EvaluateConfig
from peft_graft.distill.answer_spans import Answered
from peft_graft.distill.ask_prompts import longest_text
from peft_graft.distill.generate import Answer
from peft_graft.distill.sides import COMMONEST, EvaluatedModel, EvaluatedPrompt, Row, Score, Side, score_of
from peft_graft.distill.targets import Targets, answers_to
from peft_graft.errors import PlanError, TextError
from peft_graft.labelled.examples import LabelledExample, LabelledLike, TaggedSentence, read_examples
from peft_graft.labelled.scores import CLASS_METRICS, LabelKind, Labels, default_metrics
from peft_graft.labels import ProblemType
from peft_graft.models.loading import ModelHandle
from peft_graft.models.tasks import Task
from peft_graft.run import Run

#: What a word is that belongs to no entity, and one that the model does not come to.
_OUTSIDE = "O"
_NO_ANSWER = "(no answer)"
#: What ``--columns`` may be of words, and of questions.
_COLUMNS: dict[LabelKind, str] = {"words": "tokens,ner_tags", "spans": "question,context,answers"}


@dataclass(frozen=True)
class LabelledText:
    """Labelled examples that classifiers are compared on.

    Attributes:
        name: of their source. examples: in random order. kind: what a label is of. names: of all classes, those that
        only the examples have after the module's own. metrics: that score them. remarks: for the user.
    """

    name: str
    examples: Sequence[LabelledExample]
    kind: LabelKind
    names: Sequence[str]
    metrics: Sequence[str]
    remarks: Sequence[str] = ()

    @staticmethod
    def of(
        text: LabelledLike,
        task: Task,
        kind: LabelKind,
        names: Sequence[str],
        metrics: Sequence[str],
        config: EvaluateConfig,
    ) -> LabelledText:
        """The examples. A label that the classifiers do not give counts as missed.

        Args:
            names: of all classes, in the order of the module's outputs. metrics: those wanted, none for the usual ones.

        Raises:
            TextError: see ``read_examples``; or there are none, or the classifiers give less than half of their labels.
            PlanError: no such metric of these classes, or too many columns.
            DependencyError: the library that a metric needs is not installed.
        """
        chosen = _chosen(metrics, kind, names)
        where = str(text) if isinstance(text, str | Path) else "given in memory"
        *columns, label = config.columns or (None,)
        most, least = 1 if kind == "words" else 2, 2 if kind == "spans" else 1
        if len(columns) > most or (label and len(columns) < least):
            raise PlanError(
                "these columns are not those of a text and its label",
                where="--columns",
                expected=_COLUMNS.get(kind, "text,label or premise,hypothesis,label"),
                found=",".join(config.columns or ()),
            )
        read = read_examples(
            text, task, columns=[column for column in columns if column], label=label, labels=names, of=kind
        )  # fmt: skip
        if not read:
            raise TextError("there are no labelled examples", where=where)
        unlabelled = read.unlabelled
        found = [*read]
        random.Random(config.seed).shuffle(found)
        found = found[: config.limit]
        foreign = {} if kind in ("numbers", "spans") else _foreign_labels(found, names, where)
        names = [*names, *foreign]
        for name in chosen:  # a library that is missing is said now
            known = found[0].labels
            CLASS_METRICS[name].counts([known[:1] or ("",) if kind == "spans" else known], [known], names)
        return LabelledText(where, found, kind, names, chosen, _remarks(foreign, unlabelled, where))

    @property
    def known(self) -> list[Labels]:
        """The labels of every example."""
        return [example.labels for example in self.examples]

    @property
    def samples(self) -> list[Sample]:
        """The text of every example."""
        return [Sample(*example.texts) for example in self.examples]

    @cached_property
    def some_have_none(self) -> bool:
        """Whether there are examples without a label: questions that their text does not answer."""
        return any(not example.labels for example in self.examples)

    def scored(self, predicted: Sequence[Labels], seed: int = 0) -> dict[str, Score]:
        """The scores of predicted labels, by metric."""
        metrics = [CLASS_METRICS[name] for name in self.metrics]
        return {
            metric.name: score_of(metric.counts(predicted, self.known, self.names), metric.of_sums, seed)
            for metric in metrics
        }

    def shown(self, example: LabelledExample, labels: Labels) -> str:
        """Labels of an example as people read them: the words that have a tag, or the classes; or an answer."""
        if self.kind == "spans":
            return labels[0] or _NO_ANSWER
        if not isinstance(example, TaggedSentence):
            return ", ".join(f"{label:.4g}" if isinstance(label, float) else str(label) for label in labels)
        return (
            " ".join(f"{word}/{tag}" for word, tag in zip(example.tokens, labels, strict=True) if tag != _OUTSIDE)
            or _OUTSIDE
        )

    def said(self, rows: Sequence[Row]) -> list[EvaluatedPrompt]:
        """Every example with what was predicted of it."""
        return [
            EvaluatedPrompt(
                prompt=" / ".join(example.texts),
                references=self._references(example),
                answers={row.record.name: row.answers[number].text for row in rows if row.answers},
            )
            for number, example in enumerate(self.examples)
        ]

    def _references(self, example: LabelledExample) -> list[str]:
        if self.kind == "spans":
            return [str(answer) for answer in example.labels] or [_NO_ANSWER]
        return [self.shown(example, example.labels)]

    def commonest(self, seed: int) -> Row:
        """The row of what always gives the commonest label."""
        first = [label for label, _ in Counter(label for labels in self.known for label in labels).most_common(1)]
        words = self.kind == "words"
        predicted = [first * (len(labels) if words else 1) for labels in self.known]
        record = EvaluatedModel(name=COMMONEST, model=None, module=None, scores=self.scored(predicted, seed))
        return Row(record, ())


def kind_of_labels(raw: RawCheckpoint) -> LabelKind:
    """What the module gives to a word or a text."""
    if raw.task is Task.TOKEN_CLASSIFICATION:
        return "words"
    if raw.task is Task.QUESTION_ANSWERING:
        return "spans"
    if raw.gives_numbers:
        return "numbers"
    return "labels" if raw.problem_type is ProblemType.MULTI_LABEL else "samples"


def _foreign_labels(examples: Sequence[LabelledExample], names: Sequence[str], where: str) -> dict[str, int]:
    """How often the examples have which labels that the module does not give, the commonest first.

    Raises:
        TextError: these are more than half of all but O: names that are meant otherwise.
    """
    counts = Counter(str(label) for example in examples for label in example.labels if label != _OUTSIDE)
    foreign = {label: count for label, count in counts.most_common() if label not in names}
    if 2 * sum(foreign.values()) > counts.total():
        raise TextError(
            "the text has labels that the module does not give",
            where=where,
            expected=", ".join(names),
            found=", ".join([*foreign][:5]),
            fix="write them as the module names them, or as numbers in that order; or name the classes with --labels, "
            "in the order of the module's outputs, and the column of labels last with --columns text,label",
        )
    return foreign


def _remarks(foreign: Mapping[str, int], unlabelled: int, where: str) -> list[str]:
    remarks = [f"{where}: {unlabelled:,} row{'s' * (unlabelled > 1)} without a label left out"] if unlabelled else []
    if foreign:
        named = ", ".join([*foreign][:5]) + (", ..." if len(foreign) > 5 else "")
        remarks += [f"{where}: {sum(foreign.values()):,} labels that the module does not give count as missed: {named}"]
    return remarks


def _chosen(metrics: Sequence[str], kind: LabelKind, names: Sequence[str]) -> list[str]:
    known = [name for name, metric in CLASS_METRICS.items() if kind in metric.kinds]
    for name in metrics:
        if name not in known:
            of = {"numbers": "numbers", "spans": "answers"}.get(kind, "classes")
            raise PlanError(f"no such metric of {of}", where="--metric", expected=", ".join(known), found=name)
    return list(metrics or default_metrics(kind, names))


@dataclass(frozen=True)
class Classifying:
    """Asks classifiers and scores their classes."""

    asked: LabelledText
    config: EvaluateConfig
    run: Run

    def row(self, side: Side) -> Row:
        """A model with its module; its weights are let go of afterwards."""
        with self.run.stage(f"loading the {side.role}"):
            handle = replace(side.loaded(), tokenizer=side.handle.tokenizer)
            attached = side.attached(handle, bf16=self.config.dtype == "bfloat16")
        stage, examples = f"asking the {side.whole}", self.asked.examples
        with self.run.stage(stage):
            targets, places, spans, cut = self._targets(handle)
            predicted: list[Labels] = [()] * len(examples)
            done = 0
            for rows, logits in answers_to(attached, handle, targets, range(len(examples))):
                parts = torch.split(logits, [len(targets.values[row]) for row in rows])
                for row, part in zip(rows, parts, strict=True):
                    predicted[row] = (
                        self._answer(part[0], examples[row].texts, spans[row])
                        if self.asked.kind == "spans"
                        else self._labels(part, places[row])
                    )
                done += len(rows)
                self.run.progress(stage, done, len(examples))
        shown = [self.asked.shown(*each) for each in zip(examples, predicted, strict=True)]
        answers = [Answer(text, ended=not early) for text, early in zip(shown, cut, strict=True)]
        return Row(side.record(side.whole, self.asked.scored(predicted, self.config.seed), answers), answers)

    def _targets(
        self, handle: ModelHandle
    ) -> tuple[Targets, list[list[int | None]], list[list[Span | None]], list[bool]]:
        """What the model reads, with no answers; where every word begins; the characters of its tokens; and whether a
        text goes on beyond."""
        samples, words = self.asked.samples, self.asked.kind == "words"
        inputs, spans = tokenize(handle, samples, longest_text(handle))
        places: list[list[int | None]] = [
            _first_tokens(example.tokens, own) if isinstance(example, TaggedSentence) else [0]
            for example, own in zip(self.asked.examples, spans, strict=True)
        ]
        asked = [[(token, token + 1) for token in own if token is not None] for own in places]
        nothing = [torch.empty(len(own), 0) for own in asked]
        cut = [_goes_on(sample.texts, own) for sample, own in zip(samples, spans, strict=True)]
        kind = "samples" if self.asked.kind == "numbers" else self.asked.kind  # the whole text either way
        return Targets(kind, inputs, asked if words else [[]] * len(asked), nothing), places, spans, cut

    def _answer(self, logits: torch.Tensor, texts: Sequence[str], spans: Sequence[Span | None]) -> Labels:
        """The answer to a question by the logits [2, length] of its tokens; none, where some examples have none."""
        return [Answered.of(logits, texts, spans, may_be_none=self.asked.some_have_none).text]

    def _labels(self, logits: torch.Tensor, places: Sequence[int | None]) -> Labels:
        """The labels of an example by its logits [answers, classes]."""
        names = self.asked.names
        if self.asked.kind == "numbers":
            return [float(logits[0, 0])]
        if self.asked.kind == "labels":
            return [names[number] for number in (logits[0] > 0).nonzero()[:, 0].tolist()]
        found = iter(logits.argmax(-1).tolist())
        unread = _OUTSIDE if _OUTSIDE in names else names[0]
        return [unread if place is None else names[next(found)] for place in places]


def _first_tokens(words: Sequence[str], spans: Sequence[Span | None]) -> list[int | None]:
    """The first token of every word, None of one that the model does not come to or has no token for."""
    found, token, start = list[int | None](), 0, 0
    known = [(number, span) for number, span in enumerate(spans) if span is not None]
    for word in words:
        while token < len(known) and known[token][1].end <= start:
            token += 1
        there = token < len(known) and known[token][1].start < start + len(word)
        found.append(known[token][0] if there else None)
        start += len(word) + 1
    return found


def _goes_on(texts: Sequence[str], spans: Sequence[Span | None]) -> bool:
    """Whether a sample has more words than a model read."""
    ends = [max((span.end for span in spans if span and span.segment == segment), default=0)
            for segment in range(len(texts))]  # fmt: skip
    return any(letter.isalnum() for text, end in zip(texts, ends, strict=True) for letter in text[end:])
