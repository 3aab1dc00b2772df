"""Teacher, fresh student and grafted students on one task: the smallest comparison that says what a graft is worth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict

from peft_graft.errors import DependencyError
from peft_graft.experiments.ner import TaggedSentence, encode
from peft_graft.experiments.training import TrainingSettings, fine_tune, score_f1
from peft_graft.models import quiet_libraries

Library = Literal["peft", "adapterhub"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Run(_Record):
    """One student, fine-tuned on ``budget`` labelled sentences (0: not at all) and scored on the test sentences."""

    start: str
    budget: int
    seed: int
    f1: float
    seconds: float


class Row(_Record):
    """Runs of one start and budget over seeds. ``share_of_gain``: (mean - fresh) / (teacher - fresh), same budget."""

    start: str
    budget: int
    mean: float
    spread: float
    seeds: int
    share_of_gain: float | None


def share_of_gain(grafted: float, baseline: float, teacher: float) -> float | None:
    """(grafted - baseline) / (teacher - baseline); None where the teacher is no better than the baseline."""
    return (grafted - baseline) / (teacher - baseline) if teacher - baseline > 1e-9 else None


def summarise(runs: Sequence[Run], teacher_f1: float, baseline: str = "fresh") -> list[Row]:
    """Mean and standard deviation over seeds, and the share of the gain recovered, per start and budget."""
    groups: dict[tuple[int, str], list[float]] = {}
    for run in runs:
        groups.setdefault((run.budget, run.start), []).append(run.f1)
    rows = []
    for (budget, start), scores in groups.items():
        mean = statistics.fmean(scores)
        fresh = groups.get((budget, baseline))
        rows.append(
            Row(
                start=start,
                budget=budget,
                mean=mean,
                spread=statistics.stdev(scores) if len(scores) > 1 else 0.0,
                seeds=len(scores),
                share_of_gain=share_of_gain(mean, statistics.fmean(fresh), teacher_f1)
                if fresh and start != baseline
                else None,
            )
        )
    return rows


def new_module(base: Path | str, library: Library, labels: Sequence[str], seed: int) -> Any:
    """A student with an untrained module and head: LoRA r=8 on query and value, or a Pfeiffer adapter (factor 16)."""
    torch.manual_seed(seed)
    with quiet_libraries():
        if library == "peft":
            import peft

            model = transformers.AutoModelForTokenClassification.from_pretrained(
                base, dtype=torch.float32, **_names(labels)
            )
            row = {"mpnet": ["q", "v"], "distilbert": ["q_lin", "v_lin"]}
            return peft.get_peft_model(
                model,
                peft.LoraConfig(
                    task_type="TOKEN_CLS",
                    r=8,
                    lora_alpha=16,
                    target_modules=row.get(model.config.model_type, ["query", "value"]),
                ),
            )
        adapters = _adapters()
        model = adapters.AutoAdapterModel.from_pretrained(base, dtype=torch.float32)
        model.add_adapter("ner", config="seq_bn")
        model.add_tagging_head("ner", num_labels=len(labels), id2label=dict(enumerate(labels)))
        model.train_adapter("ner")
        return model


def load_module(base: Path | str, module: Path | str, library: Library, labels: Sequence[str]) -> Any:
    """A student with a written module, ready to be scored or trained further."""
    with quiet_libraries():
        if library == "peft":
            import peft

            model = transformers.AutoModelForTokenClassification.from_pretrained(
                base, dtype=torch.float32, **_names(labels)
            )
            return peft.PeftModel.from_pretrained(model, module, is_trainable=True)
        model = _adapters().AutoAdapterModel.from_pretrained(base, dtype=torch.float32)
        model.load_adapter(str(module), set_active=True)
        if "ner" not in model.heads:
            model.add_tagging_head("ner", num_labels=len(labels), id2label=dict(enumerate(labels)))
        model.train_adapter("ner")
        return model


def save_module(model: Any, folder: Path, library: Library) -> None:
    """Write a trained module the way its library does."""
    if library == "peft":
        model.save_pretrained(folder)
    else:
        model.save_adapter(str(folder), "ner", with_head=True)


def run_student(
    make: Callable[[], Any],
    start: str,
    train: Sequence[TaggedSentence],
    test: Sequence[TaggedSentence],
    tokenizer: Any,
    labels: Sequence[str],
    settings: TrainingSettings,
) -> Run:
    """Fine-tune one student on the sentences given (none: only score it) and score it on the test sentences."""
    model = make()
    seconds = fine_tune(model, encode(train, tokenizer, labels), tokenizer, settings) if train else 0.0
    f1 = score_f1(model, encode(test, tokenizer, labels), tokenizer, labels)
    return Run(start=start, budget=len(train), seed=settings.seed, f1=f1, seconds=round(seconds, 2))


def _names(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def _adapters() -> Any:
    try:
        import adapters
    except ImportError as error:
        raise DependencyError("adapters is not installed", fix="pip install 'peft-graft[adapters]'") from error
    return adapters
