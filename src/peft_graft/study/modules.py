"""Task models with a module inside, new or loaded, in the library that the module is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from peft_graft.config import Library
from peft_graft.errors import not_installed
from peft_graft.models.loading import describe_config
from peft_graft.models.task_models import quiet_libraries
from peft_graft.models.tasks import Task
from peft_graft.study.tasks import StudyTask

ModuleConfig = dict[str, Any] | str | None


def new_module(base: Path | str, library: Library, task: StudyTask, seed: int, config: ModuleConfig = None) -> Any:
    """A student with an untrained module and head; a causal model keeps its own head.

    BERT's sentence head sits behind a pooler that many encoders lack; it is trained and saved with the head.

    Args:
        config: of the module, for ``LoraConfig`` of peft, or the name or options of a configuration of adapters; LoRA
            r=8 on query and value, or a Pfeiffer adapter (factor 16), when None. ``bottleneck`` in the options of an
            adapter is its size, whatever the model's.
    """
    torch.manual_seed(seed)
    with quiet_libraries():
        if library is Library.PEFT:
            import peft

            model = _task_model(base, task)
            inside = model.base_model
            options: dict[str, Any] = {"r": 8, "lora_alpha": 16, **(config if isinstance(config, dict) else {})}
            options.setdefault("target_modules", _query_and_value(inside))
            if task.kind != Task.CAUSAL_LM:
                head = "qa_outputs" if task.kind == Task.QUESTION_ANSWERING else "classifier"
                pooler = getattr(inside, "pooler", None) is not None
                options["modules_to_save"] = [head, "pooler"] if pooler else [head]
            return peft.get_peft_model(model, peft.LoraConfig(task_type=task.peft_type, **options))
        adapters = _adapters()
        model = adapters.AutoAdapterModel.from_pretrained(base, trust_remote_code=False, dtype=torch.float32)
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
        if library is Library.PEFT:
            import peft

            return peft.PeftModel.from_pretrained(_task_model(base, task), module, is_trainable=True)
        model = _adapters().AutoAdapterModel.from_pretrained(base, trust_remote_code=False, dtype=torch.float32)
        model.load_adapter(str(module), set_active=True)
        if task.name not in model.heads:
            _add_prediction_head(model, task)
        model.train_adapter(task.name)
        return model


def _task_model(base: Path | str, task: StudyTask) -> Any:
    whole = {
        Task.CAUSAL_LM: transformers.AutoModelForCausalLM,
        Task.QUESTION_ANSWERING: transformers.AutoModelForQuestionAnswering,
    }
    if task.kind in whole:  # of which there are no names of labels
        return whole[task.kind].from_pretrained(base, trust_remote_code=False, dtype=torch.float32)
    auto = {
        Task.TOKEN_CLASSIFICATION: transformers.AutoModelForTokenClassification,
        Task.SEQUENCE_CLASSIFICATION: transformers.AutoModelForSequenceClassification,
    }[task.kind]
    names = {
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: index for index, label in enumerate(task.labels)},
    }
    return auto.from_pretrained(base, trust_remote_code=False, dtype=torch.float32, **names)


def _add_prediction_head(model: Any, task: StudyTask) -> None:
    if task.kind == Task.QUESTION_ANSWERING:
        model.add_qa_head(task.name)
        return
    add = model.add_tagging_head if task.kind == Task.TOKEN_CLASSIFICATION else model.add_classification_head
    add(task.name, num_labels=len(task.labels), id2label=dict(enumerate(task.labels)))


def save_module(model: Any, folder: Path, library: Library, task: StudyTask) -> None:
    """Write a trained module the way its library does."""
    if library is Library.PEFT:
        model.save_pretrained(folder)
    else:
        model.save_adapter(str(folder), task.name, with_head=True)


def _adapters() -> Any:
    try:
        import adapters
    except ImportError as error:
        raise not_installed("adapters", "adapters") from error
    return adapters
