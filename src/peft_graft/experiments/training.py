"""Fine-tuning and scoring with transformers' Trainer: the same schedule for a teacher, a fresh and a grafted module."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict

from peft_graft.experiments.tasks import Task
from peft_graft.models import quiet_libraries


class TrainingSettings(BaseModel):
    """One schedule: AdamW, linear decay after 6 % warm-up; ``bf16``: forward passes in mixed precision."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    learning_rate: float = 1e-3
    epochs: float = 5
    batch_size: int = 16
    seed: int = 0
    bf16: bool = False


def fine_tune(
    model: torch.nn.Module,
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    settings: TrainingSettings,
    each_epoch: Callable[[int], None] | None = None,
) -> float:
    """Train whatever parameters of a model are free, in place.

    Args:
        model: a task model with a module inside. rows: from ``Task.encode``.
        each_epoch: called with the number of steps done after every epoch.

    Returns:
        Seconds.
    """
    start = time.perf_counter()
    steps = int(-(-len(rows) // settings.batch_size) * settings.epochs)
    with _trainer(
        model,
        tokenizer,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=int(0.06 * steps),
        seed=settings.seed,
        bf16=settings.bf16,
        group_by_length=True,
    ) as trainer:
        trainer.train_dataset = list(rows)
        if each_epoch:
            trainer.add_callback(_EachEpoch(each_epoch))
        trainer.train()
    model.eval()
    return time.perf_counter() - start


def score(model: torch.nn.Module, rows: Sequence[dict[str, Any]], tokenizer: Any, task: Task) -> float:
    """The task's score of a model on encoded examples."""
    with _trainer(model, tokenizer, per_device_eval_batch_size=64) as trainer:
        # Of like length together: a batch is as wide as its longest row.
        output = trainer.predict(sorted(rows, key=lambda row: len(row["input_ids"])))
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    return task.score(logits, output.label_ids)


class _EachEpoch(transformers.TrainerCallback):  # type: ignore[misc]
    """Calls a function after every epoch."""

    def __init__(self, call: Callable[[int], None]) -> None:
        self.call = call

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer's event."""
        self.call(state.global_step)


class _trainer:  # noqa: N801 - a context manager, used as a function
    """A Trainer that writes nothing and says nothing."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, **arguments: Any) -> None:
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        self.folder = tempfile.TemporaryDirectory()
        self.quiet = quiet_libraries()
        self.caught = warnings.catch_warnings()

    def __enter__(self) -> Any:
        self.quiet.__enter__()
        self.caught.__enter__()
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            output_dir=str(Path(self.folder.name)),
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            label_names=["labels"],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),  # without it, bf16 is refused on a CPU
            **self.arguments,
        )
        trainer = transformers.Trainer(
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


def _collate(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> Any:
    """A padded batch; labels are padded where each token has one."""
    per_token = isinstance(rows[0]["labels"], list)
    collator = transformers.DataCollatorForTokenClassification if per_token else transformers.DataCollatorWithPadding
    return collator(tokenizer)(rows)
