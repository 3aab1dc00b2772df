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
from peft_graft.models.loading import describe_config
from peft_graft.models.task_models import quiet_libraries
from peft_graft.models.tasks import Task
from peft_graft.study.tasks import Example, StudyTask
from peft_graft.study.training import TrainingSettings, fine_tune, score

Library = Literal["peft", "adapterhub"]
ModuleConfig = dict[str, Any] | str | None
#: A teacher that is ahead of a fresh module by less, a point of a hundred, has no gain of which there could be a share.
SMALLEST_GAIN = 0.01


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Run(_Record):
    """One student, fine-tuned on ``budget`` labelled examples (0: not at all) and scored on the test examples."""

    start: str
    budget: int
    seed: int
    score: float
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
    """(grafted - baseline) / (teacher - baseline); None where the teacher is not ahead by ``SMALLEST_GAIN``."""
    return (grafted - baseline) / (teacher - baseline) if teacher - baseline >= SMALLEST_GAIN else None


def summarise(runs: Sequence[Run], teacher_score: float, baseline: str = "fresh") -> list[Row]:
    """Mean and standard deviation over seeds, and the share of the gain recovered, per start and budget."""
    groups: dict[tuple[int, str], list[float]] = {}
    for run in runs:
        groups.setdefault((run.budget, run.start), []).append(run.score)
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
                share_of_gain=share_of_gain(mean, statistics.fmean(fresh), teacher_score)
                if fresh and start != baseline
                else None,
            )
        )
    return rows


def new_module(base: Path | str, library: Library, task: StudyTask, seed: int, config: ModuleConfig = None) -> Any:
    """A student with an untrained module and head.

    BERT's sentence head sits behind a pooler that many encoders lack; it is trained and saved with the head.

    Args:
        config: of the module, for ``LoraConfig`` of peft, or the name or options of a configuration of adapters; LoRA
            r=8 on query and value, or a Pfeiffer adapter (factor 16), when None. ``bottleneck`` in the options of an
            adapter is its size, whatever the model's.
    """
    torch.manual_seed(seed)
    with quiet_libraries():
        if library == "peft":
            import peft

            model = _task_model(base, task)
            inside = model.base_model
            options: dict[str, Any] = {"r": 8, "lora_alpha": 16, **(config if isinstance(config, dict) else {})}
            options.setdefault("target_modules", _query_and_value(inside))
            pooler = getattr(inside, "pooler", None) is not None
            heads = ["classifier", "pooler"] if pooler else ["classifier"]
            return peft.get_peft_model(
                model, peft.LoraConfig(task_type=task.peft_type, modules_to_save=heads, **options)
            )  # fmt: skip
        adapters = _adapters()
        model = adapters.AutoAdapterModel.from_pretrained(base, dtype=torch.float32)
        if isinstance(config, dict):
            name = config.get("name", "seq_bn")
            options = {key: value for key, value in config.items() if key not in ("name", "bottleneck")}
            if "bottleneck" in config:
                options["reduction_factor"] = model.config.hidden_size / config["bottleneck"]
            config = adapters.AdapterConfig.load(name, **options)
        model.add_adapter(task.name, config=config or "seq_bn")
        _add_prediction_head(model, task)
        model.train_adapter(task.name)
        return model


def _query_and_value(base: Any) -> list[str]:
    """The names of the query and value projections, from the architecture table."""
    linears = describe_config(base.config).row.linears
    return [linears[role].path.rpartition(".")[2] for role in ("attn.query", "attn.value")]


def load_module(base: Path | str, module: Path | str, library: Library, task: StudyTask) -> Any:
    """A student with a written module, ready to be scored or trained further."""
    with quiet_libraries():
        if library == "peft":
            import peft

            return peft.PeftModel.from_pretrained(_task_model(base, task), module, is_trainable=True)
        model = _adapters().AutoAdapterModel.from_pretrained(base, dtype=torch.float32)
        model.load_adapter(str(module), set_active=True)
        if task.name not in model.heads:
            _add_prediction_head(model, task)
        model.train_adapter(task.name)
        return model


def _task_model(base: Path | str, task: StudyTask) -> Any:
    auto = {
        Task.TOKEN_CLASSIFICATION: transformers.AutoModelForTokenClassification,
        Task.SEQUENCE_CLASSIFICATION: transformers.AutoModelForSequenceClassification,
    }[task.kind]
    names = {
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: index for index, label in enumerate(task.labels)},
    }
    return auto.from_pretrained(base, dtype=torch.float32, **names)


def _add_prediction_head(model: Any, task: StudyTask) -> None:
    add = model.add_tagging_head if task.kind == Task.TOKEN_CLASSIFICATION else model.add_classification_head
    add(task.name, num_labels=len(task.labels), id2label=dict(enumerate(task.labels)))


def save_module(model: Any, folder: Path, library: Library, task: StudyTask) -> None:
    """Write a trained module the way its library does."""
    if library == "peft":
        model.save_pretrained(folder)
    else:
        model.save_adapter(str(folder), task.name, with_head=True)


def run_student(
    make: Callable[[], Any],
    start: str,
    train: Sequence[Example],
    test: Sequence[Example],
    tokenizer: Any,
    task: StudyTask,
    settings: TrainingSettings,
) -> Run:
    """Fine-tune one student on the examples given (none: only score it) and score it on the test examples."""
    model = make()
    seconds = fine_tune(model, task.encode(train, tokenizer), tokenizer, settings).seconds if train else 0.0
    result = score(model, task.encode(test, tokenizer), tokenizer, task)
    return Run(start=start, budget=len(train), seed=settings.seed, score=result, seconds=round(seconds, 2))


def _adapters() -> Any:
    try:
        import adapters
    except ImportError as error:
        raise DependencyError("adapters is not installed", fix="pip install 'peft-graft[adapters]'") from error
    return adapters
