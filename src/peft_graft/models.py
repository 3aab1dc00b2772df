"""Teachers and students: loaded with transformers, described without loading their weights."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from peft_graft.architectures import Architecture, describe, heads_of
from peft_graft.errors import DeviceError, ModelError
from peft_graft.formats.raw import StudentNames, task_of_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: Task -> transformers' auto classes, the first that knows the model's type. ``base`` and AdapterHub's prediction heads
#: sit on the bare model.
TASKS: Mapping[str, tuple[str, ...]] = {
    "base": ("AutoModel",),
    "prediction-heads": ("AutoModel",),
    "token-classification": ("AutoModelForTokenClassification",),
    "sequence-classification": ("AutoModelForSequenceClassification",),
    "causal-lm": ("AutoModelForCausalLM",),
    "question-answering": ("AutoModelForQuestionAnswering",),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    "image-classification": ("AutoModelForImageClassification",),
}
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass
class ModelHandle:
    """A base model ready for forward passes, with what is known about it.

    Attributes:
        name: as the user gave it. base: the bare model, in evaluation mode.
        architecture: its layers, roles and sizes. tokenizer: a fast one, None when no text is needed.
        missing: base tensors that the checkpoint lacked and that transformers initialised at random.
    """

    name: str
    base: PreTrainedModel
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase | None = None
    missing: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def fingerprint(self) -> str:
        """See ``fingerprint``; taken once."""
        return fingerprint(self.base)

    def base_tensors(self) -> dict[str, Tensor]:
        """The base model's tensors by path, without those that were initialised at random."""
        return {name: value for name, value in self.base.state_dict().items() if name not in self.missing}


def check_device(device: str) -> torch.device:
    """The device by its torch name (``cpu``, ``cuda``, ``cuda:1``, ``mps``).

    Raises:
        DeviceError: no such device on this machine.
    """
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu"]
        if torch.cuda.is_available():
            available += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            available.append("mps")
        raise DeviceError(
            "no such device", where=f"--device {device}", found=f"available: {', '.join(available)}"
        ) from error
    return chosen


def load_config(name: str, role: str = "model") -> PretrainedConfig:
    """A model's configuration, by folder or hub id.

    Raises:
        ModelError: nothing of that name can be reached.
    """
    with _loading(name, role):
        return transformers.AutoConfig.from_pretrained(name)


def describe_config(config: PretrainedConfig) -> Architecture:
    """The architecture of a model from its configuration alone, no weights loaded."""
    base = blank_model(config, "base")
    return describe(base, config.model_type, prefix_of(base))


def blank_model(config: PretrainedConfig, task: str) -> PreTrainedModel:
    """A model of this configuration without weights, on torch's meta device."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = _auto_class(task, config).from_config(config)
    return model


def student_names(name: str, config: PretrainedConfig, task: str, architecture: Architecture) -> StudentNames:
    """What a checkpoint written for this student says about it."""
    task_model = blank_model(config, task)
    heads, kv_heads = head_counts(config)
    return StudentNames(
        name=name,
        model_type=config.model_type,
        hidden_size=int(getattr(config, "hidden_size", 0) or getattr(config, "dim", 0)),
        base_class=type(blank_model(config, "base")).__name__,
        task_class=type(task_model).__name__,
        prefix=architecture.prefix,
        modules=frozenset(path for path, _ in task_model.named_modules()),
        num_layers=architecture.num_layers,
        transposed=frozenset(path for path, module in task_model.named_modules() if type(module).__name__ == "Conv1D"),
        num_heads=heads,
        num_kv_heads=kv_heads,
    )


def head_counts(config: PretrainedConfig) -> tuple[int, int]:
    """Query heads and key-value heads, (0, 0) for a model whose configuration says neither."""
    return heads_of(config)[:2] if getattr(config, "num_attention_heads", None) else (0, 0)


def load_model(
    name: str, *, device: str = "cpu", dtype: str = "float32", role: str = "model", tokenizer: bool = False
) -> ModelHandle:
    """Load a base model in evaluation mode.

    Args:
        name: folder or hub id. device: torch name. dtype: of weights and forward passes, one of ``DTYPES``.
        role: ``teacher`` or ``student``, for messages. tokenizer: whether to load its tokenizer too.

    Raises:
        ModelError: the model or its tokenizer cannot be reached or read.
        DeviceError: no such device.
        ArchitectureError: its architecture is unknown.
    """
    place = check_device(device)
    with _loading(name, role):
        base, info = transformers.AutoModel.from_pretrained(name, dtype=DTYPES[dtype], output_loading_info=True)
    base = base.to(place).eval()
    return ModelHandle(
        name,
        base,
        describe(base, base.config.model_type, prefix_of(base)),
        load_tokenizer(name, role) if tokenizer else None,
        frozenset(info["missing_keys"]),
    )


def with_task_head(
    handle: ModelHandle, task: str, labels: tuple[str, ...] = (), num_labels: int | None = None
) -> PreTrainedModel:
    """A task model around a copy of this base model, float32 on the CPU, its head filled with zeros.

    It is what a checkpoint is loaded into to see whether it loads, or to be trained; the handle's model is not touched.
    """
    config = copy.deepcopy(handle.base.config)
    set_labels(config, labels, num_labels)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # decoders classify by the last token that is not this one; ``pad`` fills with it too
    base = _copied(handle.base).float().cpu()
    model = blank_model(config, task)
    if type(model) is type(base):
        return base
    prefix = prefix_of(model)
    inside = getattr(model, prefix, model)
    if getattr(inside, "pooler", None) is None and hasattr(base, "pooler"):
        base.pooler = None  # task classes that need no pooler are built without
    if isinstance(base, type(inside)):
        setattr(model, prefix, base)
    else:
        _take_parts(inside, base, [name for name, _ in base.named_children()])
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(torch.zeros(parameter.shape)))
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            model.get_submodule(name.rpartition(".")[0]).register_buffer(
                name.rpartition(".")[2], torch.zeros(buffer.shape)
            )
    return model.eval()


def _take_parts(target: PreTrainedModel, source: PreTrainedModel, names: Iterable[str]) -> None:
    """Put parts of one model, such as its stacks, in the place of another's of the same names.

    Raises:
        ModelError: one of the two lacks a part.
    """
    for name in names:
        for model in (target, source):
            if not hasattr(model, name):
                raise ModelError(
                    f"a {type(model).__name__} has no {name}, which belongs to the base model",
                    where=model.config.model_type,
                    fix="use a task model that holds the whole base model",
                )
        setattr(target, name, getattr(source, name))


def complete(config: PretrainedConfig, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All inputs of a model that reads this text; an encoder-decoder's decoder reads the same text as its encoder.

    Not shifted by a start token, so that one pairing of tokens serves both stacks.
    """
    found = dict(inputs)
    if getattr(config, "is_encoder_decoder", False):
        found |= {f"decoder_{name}": found[name] for name in ("input_ids", "attention_mask") if name in found}
    return found


def _copied(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares the values of its matrices, which no module changes in place.

    What libraries train of a base model's own they copy first, but for vectors (biases, norms); those are copied here.
    """
    shared: dict[int, Any] = {
        id(value): nn.Parameter(value.detach(), requires_grad=value.requires_grad)
        for value in base.parameters()
        if value.ndim > 1
    }
    return copy.deepcopy(base, shared)


def set_labels(config: PretrainedConfig, labels: tuple[str, ...] = (), num_labels: int | None = None) -> None:
    """Write label names, or at least their number, into a configuration."""
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    elif num_labels is not None:
        config.num_labels = num_labels


def fresh_head(config: PretrainedConfig, task: str, num_labels: int | None, seed: int = 0) -> dict[str, Tensor]:
    """An untrained head of the task model, by path: normal with the model's own deviation, zero biases."""
    config = copy.deepcopy(config)
    set_labels(config, (), num_labels)
    model = blank_model(config, task)
    generator = torch.Generator().manual_seed(seed)
    deviation = float(getattr(config, "initializer_range", 0.02))
    return {
        name: torch.zeros(parameter.shape)
        if parameter.ndim == 1
        else deviation * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if not name.startswith(f"{prefix_of(model)}.")
    }


def own_labels(config: PretrainedConfig) -> tuple[str, ...]:
    """Label names that a configuration declares itself, empty where it has transformers' placeholders only."""
    names = [str(config.id2label[index]) for index in sorted(config.id2label)] if config.id2label else []
    return () if all(name.startswith("LABEL_") for name in names) else tuple(names)


def load_tokenizer(name: str, role: str = "model") -> PreTrainedTokenizerBase:
    """A model's fast tokenizer (character offsets are what pairs tokens).

    Raises:
        ModelError: there is none.
    """
    with _loading(name, f"{role}'s tokenizer"):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(name)
    return check_tokenizer(tokenizer, name, role)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str, role: str) -> PreTrainedTokenizerBase:
    """Refuse slow tokenizers.

    Raises:
        ModelError: the tokenizer gives no character offsets.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "a slow tokenizer gives no character offsets, so tokens cannot be paired",
            where=f"{role} {name}",
            fix="save its fast version (tokenizer.json) beside the model",
        )
    return tokenizer


def handle(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, name: str = "") -> ModelHandle:
    """Describe a live model: a bare model or a task model of transformers, without a module attached.

    Raises:
        ModelError: not a model of transformers, or one with a module inside.
        ArchitectureError: its architecture is unknown.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise ModelError(
            "not a model of transformers",
            found=type(model).__name__,
            fix="give the base model itself; for a peft model that is model.unload()",
        )
    base = getattr(model, prefix_of(model), model)
    if base is model and task_of_class(type(model).__name__) != "base":  # T5's hold the stacks themselves
        base = blank_model(model.config, "base")
        _take_parts(base, model, [name for name, _ in base.named_children()])
    if any("lora_A" in path or ".adapters." in path for path, _ in base.named_modules()):
        raise ModelError(
            "the model has a module inside, which would be part of the statistics",
            where=name or type(model).__name__,
            fix="load the base model anew, without its module",
        )
    architecture = describe(base, base.config.model_type, prefix_of(base))
    return ModelHandle(name or base.config.name_or_path or type(base).__name__, base.eval(), architecture, tokenizer)


def prefix_of(model: PreTrainedModel) -> str:
    """The attribute under which task models of this kind keep their base model."""
    declared = str(model.base_model_prefix)
    # Gemma 3's text models declare another one, or none, for the sake of the model that also sees.
    return declared if declared and (hasattr(model, declared) or not hasattr(model, "model")) else "model"


def fingerprint(base: nn.Module) -> str:
    """SHA-256 over the names, shapes and a strided sample of 256 values of every parameter, in float32.

    It tells models apart in time independent of their size, and does not change with the file they came from.
    """
    digest = hashlib.sha256()
    for name, value in sorted(base.named_parameters()):
        if name.startswith("pooler."):  # task models may lack it
            continue
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)][:256].float().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def embedding_similarity(teacher: nn.Module, student: nn.Module, rows: int = 4096) -> float | None:
    """Mean cosine between the two models' word embeddings, row by row; None where their shapes differ.

    Near 1 for a model and one made from it (distilled, pruned, tuned further), near 0 for unrelated ones.
    """
    first, second = (model.get_input_embeddings().weight.detach() for model in (teacher, student))  # type: ignore[operator]
    if first.shape != second.shape:
        return None
    step = max(1, len(first) // rows)
    return float(
        nn.functional.cosine_similarity(first[::step].cpu().float(), second[::step].cpu().float(), dim=1).mean()
    )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what transformers and adapters say about heads that are random until a checkpoint fills them.

    Also transformers 5's bars for loading weights, which would end up in logs; our own progress says as much.
    """
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    other = logging.getLogger("adapters")
    level = other.level
    other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
        other.setLevel(level)


def _auto_class(task: str, config: PretrainedConfig) -> Any:
    if task not in TASKS:
        raise ModelError(f"no model class for task {task!r}", where=config.model_type, expected=", ".join(TASKS))
    classes = [getattr(transformers, name) for name in TASKS[task]]
    return next((auto for auto in classes if type(config) in auto._model_mapping), classes[0])


@contextmanager
def _loading(name: str, role: str) -> Iterator[None]:
    try:
        with quiet_libraries():
            yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the {role} cannot be loaded ({reason})",
            where=name,
            fix=f"give a folder, or a hub id that can be reached from here{_near(name)}",
        ) from error


def _near(name: str) -> str:
    return "" if Path(name).exists() else f"; there is no folder {name}"
