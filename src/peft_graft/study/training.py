"""Fine-tuning and scoring: the same schedule for a teacher, a fresh and a grafted module."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from peft_graft.checkpoints.attached import quiet
from peft_graft.distill.training import Point, Schedule, StateStore, TrainingLoop, length_batches
from peft_graft.models.fingerprint import fingerprint
from peft_graft.models.tasks import Task
from peft_graft.record import Record
from peft_graft.study.answering import ABOUT, AnsweringTask
from peft_graft.study.generation import GenerationTask, answers_of, collate_completions, completion_loss
from peft_graft.study.ner import IGNORED
from peft_graft.study.tasks import StudyTask

#: A module that has been fitted and polished is trained on with this share of the learning rate that suits a fresh one.
FITTED_RATE = 0.1
_PREDICT_BATCH = 64


class TrainingSettings(Record):
    """One schedule: AdamW, linear decay after 6 % warm-up.

    Attributes:
        batch_size: examples a device and step; ``accumulation`` of them make an update.
        bf16, fp16: forward passes in mixed precision.
        patience: with a validation set, stop after this many epochs without a better score; None trains to the end.
        distillation: weight of the teacher's answers beside the labels, 0 to 1, for rows that have them
            (``with_teacher_answers``).
        report_to: trackers of accelerate, such as ``wandb`` or ``tensorboard``.
    """

    learning_rate: float = 1e-3
    epochs: float = 5
    batch_size: int = 16
    accumulation: int = 1
    seed: int = 0
    bf16: bool = False
    fp16: bool = False
    patience: int | None = None
    distillation: float = 0.0
    report_to: tuple[str, ...] = ()

    def schedule(self, rows: int) -> Schedule:
        """The same for the training loop, over so many rows; every epoch ends with an evaluation."""
        updates = math.ceil(math.ceil(rows / self.batch_size) / self.accumulation)
        steps = math.ceil(updates * self.epochs)
        return Schedule(
            steps=steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            accumulation=self.accumulation,
            seed=self.seed,
            evaluations=tuple(range(updates, steps + 1, updates)),
            patience=self.patience,
            bf16=self.bf16,
            fp16=self.fp16,
        )


@dataclass(frozen=True)
class Validation:
    """Labelled examples that a model is scored on after every epoch of its training.

    Attributes:
        rows: from ``StudyTask.questions``.
        keep_best: whether the best epoch's parameters, or the last one's, are the result.
    """

    rows: Sequence[dict[str, Any]]
    task: StudyTask
    tokenizer: Any
    keep_best: bool = True


@dataclass(frozen=True)
class FineTuning:
    """What a fine-tuning reports: its seconds, and (steps, score) on the validation set after every epoch."""

    seconds: float
    curve: list[tuple[int, float]]


def fine_tune(
    model: torch.nn.Module,
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    settings: TrainingSettings,
    validation: Validation | None = None,
    *,
    folder: Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> FineTuning:
    """Train whatever parameters of a model are free, in place, on the GPU where there is one.

    Args:
        model: a task model with a module inside. rows: from ``StudyTask.encode``.
        validation: what to score after every epoch; ``settings.patience`` counts these.
        folder: for the state of an interrupted run, saved after every epoch and on a ``KeyboardInterrupt``; the same
            work that finds it goes on from it, to the same result.
        on_step: called with the steps done, all of them, and the loss.
    """
    start = time.perf_counter()
    model.to(_device())
    generates = Task.of_class(type(model).__name__) is Task.CAUSAL_LM

    def loss(numbers: list[int]) -> Tensor:
        if generates:
            batch = collate_completions([rows[number] for number in numbers])
            return completion_loss(model, {key: value.to(_device()) for key, value in batch.items()})
        batch = collate(tokenizer, [rows[number] for number in numbers]).to(_device())
        return _loss(model, batch, settings.distillation)

    def evaluate(step: int) -> Point:
        assert validation is not None
        found = score(model, validation.rows, validation.tokenizer, validation.task)
        log(step, {"score": found})
        return Point(step, -found)

    schedule = settings.schedule(len(rows))

    def stepped(step: int, value: Tensor) -> None:
        log(step, {"loss": value})
        if on_step:
            on_step(step, schedule.steps, float(value))

    with quiet(), _trackers(settings) as log:
        loop = TrainingLoop(
            model,
            [len(row["input_ids"]) for row in rows],
            loss,
            schedule,
            evaluate if validation else None,
            keep_best=validation is not None and validation.keep_best,
            store=StateStore(folder) if folder else None,
            identity=_digest(model, rows, settings) if folder else "",
            on_step=stepped,
        )
        curve = loop.run()
    return FineTuning(time.perf_counter() - start, [(point.step, -point.cost) for point in curve])


def score(model: torch.nn.Module, rows: Sequence[dict[str, Any]], tokenizer: Any, task: StudyTask) -> float:
    """The task's score of a model on the rows of ``StudyTask.questions``."""
    model.to(_device()).eval()
    if isinstance(task, GenerationTask):
        prompts = [row["prompt"] for row in rows]
        with quiet():
            return task.score_texts(answers_of(model, task, tokenizer, prompts), prompts)
    if isinstance(task, AnsweringTask):
        return task.score_answers(_marked(model, rows, tokenizer), rows)
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    with quiet(), torch.no_grad():
        for numbers in length_batches([len(row["input_ids"]) for row in rows], _PREDICT_BATCH):
            batch = collate(tokenizer, [rows[number] for number in numbers]).to(_device())
            labels.extend(batch.pop("labels").cpu())
            logits.extend(model(**batch).logits.float().cpu())
    if labels[0].ndim:  # one for each token; sentences are as wide as their batch
        targets = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return task.score(pad_sequence(logits, batch_first=True).numpy(), targets.numpy())
    return task.score(torch.stack(logits).numpy(), torch.stack(labels).numpy())


def _marked(model: torch.nn.Module, rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[Tensor]:
    """Logits [2, length of the batch] of every row, of the first and of the last token of its answer."""
    inputs = [{key: value for key, value in row.items() if key not in ABOUT} for row in rows]
    found: dict[int, Tensor] = {}
    with quiet(), torch.no_grad():
        for numbers in length_batches([len(row["input_ids"]) for row in rows], _PREDICT_BATCH):
            output = model(**collate(tokenizer, [inputs[number] for number in numbers]).to(_device()))
            both = torch.stack([output.start_logits, output.end_logits], 1).float().cpu()
            found |= dict(zip(numbers, both, strict=True))
    return [found[number] for number in range(len(rows))]


def _loss(model: torch.nn.Module, batch: Any, distillation: float) -> Tensor:
    """The model's own loss, or (1 - a) labels + a teacher for rows that have the teacher's answers."""
    teacher = batch.pop("teacher", None)
    if teacher is None:
        own: Tensor = model(**batch).loss
        return own
    labels = batch.pop("labels")
    logits = model(**batch).logits.float()
    known = labels != IGNORED
    hard = torch.nn.functional.cross_entropy(logits[known], labels[known]) if bool(known.any()) else logits.sum() * 0
    asked = torch.isfinite(teacher).all(-1)
    soft: Tensor = -(teacher[asked] * logits[asked].log_softmax(-1)).sum(-1).mean()
    return (1 - distillation) * hard + distillation * soft


def with_teacher_answers(
    rows: Sequence[dict[str, Any]],
    teacher: torch.nn.Module,
    teacher_rows: Sequence[dict[str, Any]],
    teacher_tokenizer: Any,
    *,
    keep_labels: bool = True,
) -> list[dict[str, Any]]:
    """Rows with the teacher's answers beside their labels, for a fine-tuning that goes on distilling.

    Args:
        rows, teacher_rows: the same examples as the student's and the teacher's tokenizer encode them.
        keep_labels: whether the labels are known; where not, only the teacher's answers count.
    """
    found: list[dict[str, Any]] = [{}] * len(rows)
    teacher.to(_device()).eval()
    for numbers in length_batches([len(row["input_ids"]) for row in teacher_rows], _PREDICT_BATCH):
        inputs = collate(teacher_tokenizer, [teacher_rows[number] for number in numbers]).to(_device())
        targets = inputs.pop("labels")
        with torch.inference_mode():
            answers = teacher(**inputs).logits.float().softmax(-1)
        for index, number in enumerate(numbers):
            asked = targets[index] != IGNORED if targets.ndim > 1 else ...
            words = teacher_rows[number].get("words")
            given = answers[index][asked].tolist()
            found[number] = _with_answers(
                rows[number], dict(zip(words, given, strict=True)) if words else given, keep_labels=keep_labels
            )
    return found


def _with_answers(row: dict[str, Any], answers: Any, *, keep_labels: bool) -> dict[str, Any]:
    """A row with the teacher's distribution, or with one, of those by word, at the first token of every word that both
    models read, and none elsewhere."""
    labels = row["labels"]
    if not isinstance(labels, list):
        return {**row, "teacher": answers, "labels": labels if keep_labels else IGNORED}
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    blank = [math.nan] * len(next(iter(answers.values())))
    given = {place: answers[word] for place, word in zip(places, row["words"], strict=True) if word in answers}
    teacher = [given.get(place, blank) for place in range(len(labels))]
    return {**row, "teacher": teacher, "labels": labels if keep_labels else [IGNORED] * len(labels)}


def collate(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> Any:
    """A batch, padded at the end, where the places of answers stay as they are; labels, and the teacher's answers, are
    padded where each token has one."""
    teacher = [row["teacher"] for row in rows] if "teacher" in rows[0] else None
    rows = [{key: value for key, value in row.items() if key not in ("teacher", "words")} for row in rows]
    per_token = isinstance(rows[0].get("labels"), list)
    collator = transformers.DataCollatorForTokenClassification if per_token else transformers.DataCollatorWithPadding
    before, tokenizer.padding_side = tokenizer.padding_side, "right"
    try:
        batch = collator(tokenizer)(rows)
    finally:
        tokenizer.padding_side = before
    if teacher is not None:
        width = batch["input_ids"].shape[1]
        if per_token:
            teacher = [row + [[math.nan] * len(row[0])] * (width - len(row)) for row in teacher]
        batch["teacher"] = torch.tensor(teacher)
    return batch


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _digest(model: torch.nn.Module, rows: Sequence[dict[str, Any]], settings: TrainingSettings) -> str:
    """What tells a training from others: where it begins, on what, and how."""
    content = fingerprint(model) + json.dumps(list(rows)) + settings.model_dump_json()
    return hashlib.sha256(content.encode()).hexdigest()


@contextmanager
def _trackers(settings: TrainingSettings) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """A function that tells the trackers what happened at a step."""
    if not settings.report_to:
        yield lambda step, values: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(settings.report_to), project_dir=".")
    plain = {name: value for name, value in settings if isinstance(value, bool | int | float | str)}
    accelerator.init_trackers("peft-graft", config=plain)
    try:
        yield lambda step, values: accelerator.log({name: float(value) for name, value in values.items()}, step=step)
    finally:
        accelerator.end_training()
