"""Models that are compared on labelled text: a graft, its student, the teacher; and the scores of each, a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.checkpoints.convert import as_lora
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import GraftConfig
from peft_graft.distill.generate import Answer
from peft_graft.metrics import OfSums, interval
from peft_graft.models.loading import Loading, ModelHandle, load_model
from peft_graft.models.tasks import Task
from peft_graft.prompts.template import Template
from peft_graft.record import Record

#: Rows of a graft, and of a plain module; and of what always gives the commonest class.
STUDENT, GRAFT, TEACHER, TEACHER_BASE, BASE, MODULE = "student", "graft", "teacher", "teacher base", "base", "module"
COMMONEST = "commonest class"


class Score(Record):
    """A score, and the middle 95 % of what it is over prompts drawn from these; None where that is not known."""

    value: float
    low: float | None = None
    high: float | None = None


class EvaluatedModel(Record):
    """One row: a model, its module if it has one, and their scores by metric.

    ``nll`` is in nats a token of the reference, its end among them, ``nll/byte`` in nats a byte, which compares between
    tokenizers; less of them and of ``rmse`` is better, and more of all else. ``cut``: answers that came to no end, or
    texts that are classified and are longer than the model reads. ``empty``: answers without text.
    """

    name: str
    model: str | None
    module: str | None
    scores: dict[str, Score]
    cut: int = 0
    empty: int = 0


class EvaluatedPrompt(Record):
    """A prompt or a text, the answers that are accepted, or its labels, and what every row answered."""

    prompt: str
    references: list[str]
    answers: dict[str, str]


@dataclass(frozen=True)
class Row:
    """A row with its answers, none where no metric asks for them."""

    record: EvaluatedModel
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Side:
    """A model, the module that is on it, and the rows that they make.

    Attributes:
        handle: the model, described without weights unless it is in memory. loading: how to load it.
        raw: the module. module: its name. labels: names of its classes.
        bare, whole: names of the rows without and with the module; None for one that is not wanted.
        settings: what the module's report and the user say about prompts.
    """

    handle: ModelHandle
    loading: Loading
    raw: RawCheckpoint
    module: str
    labels: tuple[str, ...]
    bare: str | None
    whole: str
    settings: GraftConfig

    @property
    def role(self) -> str:
        """What messages call the model."""
        return role_of(self.whole)

    def loaded(self) -> ModelHandle:
        """The model with weights."""
        return load_model(self.handle.name, self.loading, role=self.role) if self.handle.is_blank else self.handle

    def attached(self, handle: ModelHandle, *, bf16: bool) -> AttachedModel:
        """The loaded model with the module inside."""
        raw = as_lora(self.raw, handle) if self.raw.needs_conversion else self.raw
        return attach(raw, handle, self.labels, bf16=bf16, speaks=raw.task is Task.CAUSAL_LM)

    def record(self, name: str, scores: dict[str, Score], answers: Sequence[Answer]) -> EvaluatedModel:
        """One of its rows."""
        return EvaluatedModel(
            name=name,
            model=self.handle.name,
            module=None if name == self.bare else self.module,
            scores=scores,
            cut=sum(not answer.ended for answer in answers),
            empty=sum(not answer.text.strip() for answer in answers),
        )


@dataclass(frozen=True)
class SpeakingSide(Side):
    """A language model; ``template``: how it reads prompts."""

    template: Template


def role_of(row: str) -> str:
    """What messages call the model of a row."""
    return {TEACHER: "teacher", GRAFT: "student"}.get(row, "model")


def score_of(counts: Sequence[Sequence[float]], of_sums: OfSums, seed: int) -> Score:
    """The score that the sums of these numbers of every answer make.

    Args:
        seed: of the interval.
    """
    sums = [sum(column) for column in zip(*counts, strict=True)]
    low, high = interval(counts, of_sums, seed=seed)
    return Score(value=of_sums(sums, len(counts)), low=low, high=high)
