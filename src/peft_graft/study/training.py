"""Fine-tuning and scoring with transformers' Trainer: the same schedule for a teacher, a fresh and a grafted module."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict

from peft_graft.models.devices import trainable_attention
from peft_graft.models.task_models import quiet_libraries
from peft_graft.study.ner import IGNORED
from peft_graft.study.tasks import StudyTask

#: A module that has been fitted and polished is trained on with this share of the learning rate that suits a fresh one.
FITTED_RATE = 0.1

#: Examples of like length together; transformers 5 has another name for it.
_BY_LENGTH: dict[str, Any] = (
    {"group_by_length": True}
    if "group_by_length" in transformers.TrainingArguments.__dataclass_fields__
    else {"train_sampling_strategy": "group_by_length"}
)


class TrainingSettings(BaseModel):
    """One schedule: AdamW, linear decay after 6 % warm-up.

    Attributes:
        batch_size: examples a device and step; ``accumulation`` of them make an update.
        bf16, fp16: forward passes in mixed precision.
        patience: with a validation set, stop after this many epochs without a better score; None trains to the end.
        distillation: weight of the teacher's answers beside the labels, 0 to 1, for rows that have them (``taught``).
        report_to: trackers of transformers' Trainer, such as ``wandb`` or ``tensorboard``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
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


class Watch:
    """Scores a model after every epoch of its training, keeps the best parameters, and says when to stop.

    Args:
        rows: the validation set, from ``StudyTask.encode``. patience: see ``TrainingSettings``.
        keep_best: whether the best epoch's parameters, or the last one's, shall be left in the model.

    Attributes:
        curve: (steps, score) of every epoch.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        task: StudyTask,
        tokenizer: Any,
        *,
        patience: int | None = None,
        keep_best: bool = True,
    ) -> None:
        self.rows, self.task, self.tokenizer = rows, task, tokenizer
        self.patience, self.keep_best = patience, keep_best
        self.curve: list[tuple[int, float]] = []
        self._best: dict[str, torch.Tensor] = {}
        self._best_score = -math.inf
        self._since = 0

    def __call__(self, model: torch.nn.Module, step: int) -> bool:
        """Score the model; whether to stop."""
        found = score(model, self.rows, self.tokenizer, self.task)
        model.train()
        self.curve.append((step, found))
        self._since += 1
        if found > self._best_score:
            self._best_score, self._since = found, 0
            if self.keep_best:
                self._best = {name: value.detach().clone() for name, value in _trainable(model)}
        return self.patience is not None and self._since >= self.patience

    def restore(self, model: torch.nn.Module) -> None:
        """Put the best epoch's parameters back."""
        if not self.keep_best:
            return
        with torch.no_grad():
            for name, value in _trainable(model):
                if name in self._best:
                    value.copy_(self._best[name])


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


def fine_tune(
    model: torch.nn.Module,
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    settings: TrainingSettings,
    watch: Watch | None = None,
) -> float:
    """Train whatever parameters of a model are free, in place.

    Args:
        model: a task model with a module inside. rows: from ``StudyTask.encode``.
        watch: scores a validation set after every epoch.

    Returns:
        Seconds.
    """
    start = time.perf_counter()
    steps = int(-(-len(rows) // (settings.batch_size * settings.accumulation)) * settings.epochs)
    with _trainer(
        model,
        tokenizer,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        warmup_steps=int(0.06 * steps),
        seed=settings.seed,
        bf16=settings.bf16,
        fp16=settings.fp16,
        report_to=list(settings.report_to) or "none",
        **_BY_LENGTH,
    ) as trainer:
        trainer.distillation = settings.distillation
        trainer.train_dataset = list(rows)
        if watch:
            trainer.add_callback(_EachEpoch(watch))
        trainer.train()
    if watch:
        watch.restore(model)
    model.eval()
    return time.perf_counter() - start


def score(model: torch.nn.Module, rows: Sequence[dict[str, Any]], tokenizer: Any, task: StudyTask) -> float:
    """The task's score of a model on encoded examples."""
    with _trainer(model, tokenizer, per_device_eval_batch_size=64) as trainer:
        # Of like length together: a batch is as wide as its longest row.
        output = trainer.predict(sorted(rows, key=lambda row: len(row["input_ids"])))
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    return task.score(logits, output.label_ids)


class _EachEpoch(transformers.TrainerCallback):  # type: ignore[misc]
    """Lets a ``Watch`` look at the model after every epoch."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The Trainer's event."""
        control.should_training_stop |= self.watch(model, state.global_step)


class _trainer:  # noqa: N801 - a context manager, used as a function
    """A Trainer that writes nothing and says nothing."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, **arguments: Any) -> None:
        self.model, self.tokenizer, self.arguments = model, tokenizer, {"report_to": "none", **arguments}
        self.folder = tempfile.TemporaryDirectory()
        self.quiet = quiet_libraries()
        self.caught = warnings.catch_warnings()

    def __enter__(self) -> Any:
        self.quiet.__enter__()
        self.caught.__enter__()
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            output_dir=str(Path(self.folder.name)),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            label_names=["labels"],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),  # without it, bf16 is refused on a CPU
            **self.arguments,
        )
        trainer = _DistillingTrainer(
            model=self.model,
            args=arguments,
            data_collator=partial(_collate, self.tokenizer),
        )
        trainer.callback_handler.callbacks = [
            callback for callback in trainer.callback_handler.callbacks if "Printer" not in type(callback).__name__
        ]
        return trainer

    def __exit__(self, *exception: object) -> None:
        self.caught.__exit__(None, None, None)
        self.quiet.__exit__(None, None, None)
        self.folder.cleanup()


def taught(
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
    found = []
    teacher.eval()
    for start in range(0, len(rows), 32):
        batch = [dict(row) for row in teacher_rows[start : start + 32]]
        inputs = _collate(teacher_tokenizer, batch)
        targets = inputs.pop("labels")
        with torch.inference_mode():
            answers = teacher(**inputs).logits.float().softmax(-1)
        for index, row in enumerate(rows[start : start + 32]):
            new = dict(row)
            if isinstance(row["labels"], list):
                words = answers[index][targets[index] != IGNORED].tolist()
                places = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
                blank = [math.nan] * answers.shape[-1]
                new["teacher"] = [blank] * len(row["labels"])
                for place, answer in zip(places, words, strict=False):  # either side may have cut a long sentence
                    new["teacher"][place] = answer
                new["labels"] = row["labels"] if keep_labels else [IGNORED] * len(row["labels"])
            else:
                new["teacher"] = answers[index].tolist()
                new["labels"] = row["labels"] if keep_labels else IGNORED
            found.append(new)
    return found


class _DistillingTrainer(transformers.Trainer):  # type: ignore[misc]
    """A Trainer whose loss mixes in the cross entropy with the teacher's answers where rows have them."""

    distillation = 0.0

    def compute_loss_context_manager(self) -> Any:
        """The Trainer's mixed precision, and an attention whose gradients are cheap."""
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        stack.enter_context(trainable_attention(self.args.device, bf16=self.args.bf16))
        return stack

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The Trainer's loss, or (1 - a) labels + a teacher."""
        teacher = inputs.pop("teacher", None)
        if teacher is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits.float()
        known = labels != IGNORED
        hard = (
            torch.nn.functional.cross_entropy(logits[known], labels[known]) if bool(known.any()) else logits.sum() * 0
        )
        asked = torch.isfinite(teacher).all(-1)
        soft = -(teacher[asked] * logits[asked].log_softmax(-1)).sum(-1).mean()
        loss = (1 - self.distillation) * hard + self.distillation * soft
        return (loss, outputs) if return_outputs else loss


def _collate(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> Any:
    """A padded batch; labels, and the teacher's answers, are padded where each token has one."""
    teacher = [row["teacher"] for row in rows] if "teacher" in rows[0] else None
    rows = [{key: value for key, value in row.items() if key != "teacher"} for row in rows]
    per_token = isinstance(rows[0]["labels"], list)
    collator = transformers.DataCollatorForTokenClassification if per_token else transformers.DataCollatorWithPadding
    batch = collator(tokenizer)(rows)
    if teacher is not None:
        width = batch["input_ids"].shape[1]
        if per_token:
            teacher = [row + [[math.nan] * len(row[0])] * (width - len(row)) for row in teacher]
        batch["teacher"] = torch.tensor(teacher)
    return batch
