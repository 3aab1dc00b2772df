"""Labelled tasks: what an example is, how it becomes a model's input, and how predictions are scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from peft_graft.labelled.examples import AnsweredQuestion, LabelledPair, TaggedSentence
from peft_graft.labelled.scores import CLASS_METRICS
from peft_graft.models.tasks import Task
from peft_graft.prompts.conversation import Prompt
from peft_graft.study import ner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 128
Metric = Literal["entity F1", "accuracy", "macro F1", "token F1", "exact match"]
#: How tasks of a kind can be scored; the first where nothing is said.
METRICS: dict[str, tuple[Metric, ...]] = {
    Task.TOKEN_CLASSIFICATION: ("entity F1",),
    Task.SEQUENCE_CLASSIFICATION: ("accuracy", "macro F1"),
    Task.QUESTION_ANSWERING: ("token F1", "exact match"),
}


Example = TaggedSentence | LabelledPair | AnsweredQuestion | Prompt


@dataclass(frozen=True)
class StudyTask:
    """A task with its label names.

    Attributes:
        name: as in files and tables. labels: class names, in the order of the model's outputs.
        kind: ``token-classification`` or ``sequence-classification``; ``question-answering`` of an ``AnsweringTask``,
            ``causal-lm`` of a ``GenerationTask``.
        metric: how it is scored, one of ``METRICS``.
    """

    name: str
    kind: Task
    labels: tuple[str, ...]
    metric: str

    @property
    def peft_type(self) -> str:
        """The task type of peft's configurations."""
        return str(self.kind.peft_type)

    def encode(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Model inputs with labels, not padded."""
        if self.kind == Task.TOKEN_CLASSIFICATION:
            tagged = [example for example in examples if isinstance(example, TaggedSentence)]
            return ner.encode(tagged, tokenizer, self.labels, MAX_LENGTH)
        rows = []
        for example in examples:
            assert isinstance(example, LabelledPair)
            texts = (example.first,) if example.second is None else (example.first, example.second)
            encoding = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH)
            rows.append({**{key: encoding[key] for key in encoding}, "labels": self.labels.index(example.label)})
        return rows

    def questions(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """What a model is scored on: the same rows that it is trained on."""
        return self.encode(examples, tokenizer)

    def score(self, logits: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
        """Entity F1 of logits [n, length, labels]; accuracy, or mean F1 over the classes, of logits [n, labels]."""
        predicted, known = self._named(logits.argmax(-1), targets), self._named(targets, targets)
        return CLASS_METRICS[self.metric.lower().replace(" ", "-")].score(predicted, known, self.labels)

    def _named(self, values: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> list[list[str]]:
        """The labels of every example, where it has targets."""
        sides = (side.reshape(len(side), -1) for side in (values, targets))
        return [[self.labels[value] for value in row[own != ner.IGNORED]] for row, own in zip(*sides, strict=True)]

    def majority_score(self, test: Sequence[Example]) -> float:
        """The score of always giving the most frequent class: 0 for entities."""
        if self.kind == Task.TOKEN_CLASSIFICATION:
            return 0.0
        targets = np.array([self.labels.index(example.label) for example in test if isinstance(example, LabelledPair)])
        commonest = np.eye(len(self.labels))[[Counter(targets.tolist()).most_common(1)[0][0]] * len(targets)]
        return self.score(commonest, targets)


def ner_task(examples: Sequence[TaggedSentence]) -> StudyTask:
    """The task of tagged sentences, its labels those in use."""
    return StudyTask("ner", Task.TOKEN_CLASSIFICATION, ner.tag_names(examples), "entity F1")
