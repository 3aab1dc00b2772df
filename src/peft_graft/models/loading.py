"""Teachers and students: loaded with transformers, or described from their configurations alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from peft_graft.errors import ModelError
from peft_graft.hub import local_only
from peft_graft.models.architecture import Architecture, describe
from peft_graft.models.checks import check_counts, check_no_module, check_quantisation, explained
from peft_graft.models.devices import (
    BaseTensors,
    check_device,
    check_range,
    device_of,
    is_blank,
    is_quantised,
    keep_trainable,
)
from peft_graft.models.fingerprint import (
    config_fingerprint,
    fingerprint,
    hash_tensors,
    pooler_fingerprint,
    tokenizer_fingerprint,
)
from peft_graft.models.places import hub_id_of, place_of
from peft_graft.models.spec import LM_HEAD_ROLE
from peft_graft.models.task_models import blank_model, is_remote, prefix_of, take_parts
from peft_graft.models.tasks import Task
from peft_graft.models.vocabulary import output_layer
from peft_graft.record import Record

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Loading:
    """How a model is loaded: Hugging Face's own arguments under their own names.

    Attributes:
        revision: branch, tag or commit on the hub. subfolder: where the model is in its repository.
        token: for private repositories. trust_remote_code: whether to run model code that a repository brings.
        quantization_config: transformers' object, or the same as a dictionary.
        device_map: accelerate's choice for every layer (``auto``, a dictionary, ...), in place of ``device``.
        device: torch name. dtype: of weights and forward passes, one of ``DTYPES``; in a quantised model of what is not
            quantised.
    """

    revision: str | None = None
    subfolder: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    quantization_config: Any = None
    device_map: str | Mapping[str, Any] | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def source(self, name: str) -> dict[str, Any]:
        """Arguments of every ``from_pretrained`` of a folder or hub id.

        ``trust_remote_code`` is always among them: without it transformers asks on the terminal, and waits.
        """
        found = {"revision": self.revision, "subfolder": self.subfolder, "token": self.token}
        given = {name: value for name, value in found.items() if value is not None}
        return {**given, **local_only(name), "trust_remote_code": self.trust_remote_code}

    @property
    def weights(self) -> dict[str, Any]:
        """Further arguments for a model, but for the device."""
        quantised = self.quantization_config
        found = (
            {} if quantised is None else {"quantization_config": copy.deepcopy(quantised)}
        )  # transformers writes to it
        return {"dtype": DTYPES[self.dtype], **found}


DEFAULT_LOADING = Loading()


class ModelRecord(Record):
    """What a report says about a teacher or student: ``name`` is a hub id or a path, ``hub_id`` as far as is known."""

    name: str
    hub_id: str | None = None
    model_type: str
    num_layers: int
    hidden_size: int
    inferred_architecture: bool
    fingerprint: str | None = None

    @property
    def reachable(self) -> str:
        """Where to load it from: its folder, or the hub where that is not here."""
        return self.name if self.hub_id is None or Path(self.name).exists() else self.hub_id


@dataclass
class ModelHandle:
    """A base model ready for forward passes, with what is known about it.

    Attributes:
        name: as the user gave it. base: the bare model, in evaluation mode.
        architecture: its layers, roles and sizes. tokenizer: a fast one, None when no text is needed.
        missing: base tensors that the checkpoint lacked and that transformers initialised at random.
        output, output_bias: [V, d] and [V], the output layer's weight and bias, where the model was given as a language
            model, or once they have been asked for.
        loading: how it was loaded by its name.
        place: its hub id, or its folder's absolute path, which is found wherever the process goes.
    """

    name: str
    base: PreTrainedModel
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase | None = None
    missing: frozenset[str] = field(default_factory=frozenset)
    output: Tensor | None = field(default=None, repr=False)
    output_bias: Tensor | None = field(default=None, repr=False)
    loading: Loading = DEFAULT_LOADING
    place: str = field(init=False)

    def __post_init__(self) -> None:
        self.place = place_of(self.name)

    @cached_property
    def fingerprint(self) -> str:
        """See ``models.fingerprint``; taken once."""
        return fingerprint(self.base)

    @property
    def text_config(self) -> PretrainedConfig:
        """The configuration of what reads text: of the text tower, in a model that reads more."""
        config: PretrainedConfig = self.base.config
        return getattr(config, "text_config", None) or config if self.architecture.tower else config

    @cached_property
    def key(self) -> str:
        """Tells it from whatever computes something else: by all values, the configuration and the tokenizer."""
        parts = [self.fingerprint, pooler_fingerprint(self.base, self.missing), config_fingerprint(self.base.config)]
        return " ".join([*parts, *([tokenizer_fingerprint(self.tokenizer)] if self.tokenizer is not None else [])])

    @cached_property
    def speaking_key(self) -> str:
        """The same of a language model, which its output layer belongs to; that is loaded if need be."""
        path = f"{self.architecture.vocabulary.get(LM_HEAD_ROLE)}.weight"
        weight = self.base_tensors(output=True).get(path)
        output = {"weight": weight, "bias": self.output_bias}
        return f"{self.key} {hash_tensors((name, value) for name, value in output.items() if value is not None)}"

    @cached_property
    def padding(self) -> int:
        """The token that rows of a batch are filled up with: the configuration's, else the tokenizer's, else the last
        of all, which no text ends in. Decoders classify by the last token that is another one."""
        size = self.architecture.num_embeddings
        whose = (self.text_config, self.base.config, self.tokenizer)
        own = (getattr(one, "pad_token_id", None) for one in whose)
        known = (token for token in own if isinstance(token, int) and 0 <= token < (size or token + 1))
        return next(known, (size or 1) - 1)

    @cached_property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return device_of(self.base)

    def base_tensors(self, *, output: bool = False) -> Mapping[str, Tensor]:
        """The base model's tensors by path, without those that were initialised at random.

        Args:
            output: also the output layer's weight, by its path in a language model; loaded when it is first asked for.

        Raises:
            ModelError: there is no language model of this name to take it from, or it has no output layer.
        """
        path = self.architecture.vocabulary.get(LM_HEAD_ROLE)
        if output and path:
            if self.output is None:
                options = {} if self.is_blank else {**self.loading.source(self.place), **self.loading.weights}
                lm_head = str(self.architecture.row.lm_head)
                self.output, self.output_bias = output_layer(self.base, self.place, lm_head, options)
            return BaseTensors(self.base, self.missing, {f"{path}.weight": self.output})
        return self._base_tensors

    @cached_property
    def _base_tensors(self) -> BaseTensors:
        return BaseTensors(self.base, self.missing, {})

    @property
    def record(self) -> ModelRecord:
        """The model for a report."""
        unnamed = self.name == type(self.base).__name__  # a live model that came from nowhere
        return ModelRecord(
            name=self.place,
            hub_id=None if unnamed else hub_id_of(self.place),
            model_type=self.architecture.model_type,
            num_layers=self.architecture.num_layers,
            hidden_size=self.architecture.hidden_size,
            inferred_architecture=self.architecture.inferred,
            fingerprint=self.fingerprint,
        )

    @property
    def is_blank(self) -> bool:
        """Whether it was made from a configuration alone: shapes without values (``blank_handle``)."""
        return is_blank(self.base)


@dataclass(frozen=True)
class ModelPair:
    """The model that a module was trained on, and the one that receives it."""

    teacher: ModelHandle
    student: ModelHandle

    @property
    def fingerprints(self) -> tuple[str, str]:
        """Of the teacher and of the student."""
        return self.teacher.fingerprint, self.student.fingerprint

    @property
    def keys(self) -> tuple[str, str]:
        """What tells the teacher and the student from all that compute something else."""
        return self.teacher.key, self.student.key

    @property
    def speaking_keys(self) -> tuple[str, str]:
        """The same of language models."""
        return self.teacher.speaking_key, self.student.speaking_key


def load_config(name: str, loading: Loading = DEFAULT_LOADING, *, role: str = "model") -> PretrainedConfig:
    """A model's configuration, by folder or hub id.

    Args:
        name: folder or hub id. loading: where it is on the hub. role: ``teacher`` or ``student``, for messages.

    Raises:
        ModelError: nothing of that name can be reached, it is a module or holds one, or it needs code that comes with
            its repository.
        DependencyError: its weights are quantised by a library that is not installed.
    """
    source = loading.source(name)
    check_no_module(name, source, role)
    with explained(name, role):
        config = transformers.AutoConfig.from_pretrained(name, **source)
    check_quantisation(config, loading.quantization_config, name, role)
    return config


def describe_config(config: PretrainedConfig) -> Architecture:
    """The architecture of a model from its configuration alone, no weights loaded."""
    return blank_handle(config).architecture


def blank_handle(config: PretrainedConfig, name: str = "", loading: Loading = DEFAULT_LOADING) -> ModelHandle:
    """A model without values, made from a configuration alone; ``loading`` is how it would be loaded.

    It is on torch's meta device, as are its ``base_tensors``, for code that needs shapes only. It has no fingerprint.

    Raises:
        ModelError: it cannot be built. ArchitectureError: its architecture is unknown.
    """
    name = name or config.name_or_path or config.model_type
    with explained(name, "model of this configuration"):
        check_counts(config.to_dict())
        base = blank_model(config, Task.BASE, trust_remote_code=loading.trust_remote_code).eval()
        architecture = describe(base, config.model_type, prefix_of(base))
    return ModelHandle(name, base, architecture, loading=loading)


def load_model(
    name: str, loading: Loading = DEFAULT_LOADING, *, role: str = "model", tokenizer: bool = False
) -> ModelHandle:
    """Load a base model in evaluation mode.

    Args:
        name: folder or hub id. loading: from where, and to which device and dtype.
        role: ``teacher`` or ``student``, for messages. tokenizer: whether to load its tokenizer too.

    Raises:
        ModelError: the model or its tokenizer cannot be reached or read, or needs code that comes with it.
        DeviceError: no such device.
        ArchitectureError: its architecture is unknown.
    """
    place = check_device(loading.device)
    config = load_config(name, loading, role=role)
    with explained(name, role):
        base, missing = _load_base(name, {**loading.source(name), **_options(config, loading, place)})
    if loading.device_map is None and not is_quantised(base):
        base = base.to(place)
    keep_trainable(base)
    if loading.dtype == "float16":
        check_range(base, f"{role} {name}")
    base = base.eval()
    architecture = describe(base, base.config.model_type, prefix_of(base))
    own = load_tokenizer(name, loading, role=role) if tokenizer else None
    return ModelHandle(name, base, architecture, own, missing, loading=loading)


def _options(config: PretrainedConfig, loading: Loading, place: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` beside where the model is."""
    options = {**loading.weights, "output_loading_info": True}
    if loading.device_map is not None:
        options["device_map"] = loading.device_map
    elif hasattr(config, "quantization_config") or loading.quantization_config is not None:
        options["device_map"] = {"": place}  # cannot be moved once it is loaded
    return options


def _load_base(name: str, options: Mapping[str, Any]) -> tuple[PreTrainedModel, frozenset[str]]:
    """A bare model, and the names of its tensors that are not in the checkpoint.

    Raises:
        ModelError: most of them are not.
    """
    base, info = transformers.AutoModel.from_pretrained(name, **options)
    missing = frozenset(info["missing_keys"])
    if 2 * len(missing) <= len(base.state_dict()):
        return base, missing
    # Some bare classes do not find themselves in a task model's file (Gemma 3 in transformers 4); its own class does.
    for saved in base.config.architectures or ():
        whole = getattr(transformers, saved, None)
        if whole is None or whole is type(base):
            continue
        model, info = whole.from_pretrained(name, **options)
        prefix = f"{prefix_of(model)}."
        missing = frozenset(key.removeprefix(prefix) for key in info["missing_keys"] if key.startswith(prefix))
        inside = getattr(model, prefix.rstrip("."), None)
        if inside is not None and type(inside) is type(base) and 2 * len(missing) <= len(base.state_dict()):
            return inside, missing
    raise ModelError(
        "most of the model's weights are not in its checkpoint",
        where=name,
        expected=f"tensors like {next(iter(sorted(base.state_dict())))}",
        fix="save it with save_pretrained of a model class that holds it",
    )


def load_tokenizer(name: str, loading: Loading = DEFAULT_LOADING, *, role: str = "model") -> PreTrainedTokenizerBase:
    """A model's fast tokenizer (character offsets are what pairs tokens).

    Raises:
        ModelError: there is none.
    """
    with explained(name, f"{role}'s tokenizer"):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(name, **loading.source(name))
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


def wrap_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    find_tokenizer: bool = False,
    role: str = "model",
) -> ModelHandle:
    """Describe a model that is in memory: a bare model or a task model of transformers, without a module attached.

    Args:
        model: stays where it is, in the dtype that it has; it is put in evaluation mode.
        tokenizer: a fast one. find_tokenizer: whether to load that of its name where none is given.
        role: ``teacher`` or ``student``, for messages.

    Raises:
        ModelError: not a model of transformers, one with a module inside, or no tokenizer where one is asked for.
        ArchitectureError: its architecture is unknown.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise ModelError(
            "not a model of transformers",
            found=type(model).__name__,
            fix="give the base model itself; for a peft model that is model.unload()",
        )
    base = getattr(model, prefix_of(model), model)
    if base is model and Task.of_class(type(model).__name__) is not Task.BASE:  # T5's hold the stacks themselves
        base = blank_model(model.config, Task.BASE, trust_remote_code=is_remote(model))
        take_parts(base, model, [name for name, _ in base.named_children()])
    if any("lora_A" in path or ".adapters." in path for path, _ in base.named_modules()):
        raise ModelError(
            "the model has a module inside, which would be part of the statistics",
            where=type(model).__name__,
            fix="load the base model anew, without its module",
        )
    keep_trainable(base)
    architecture = describe(base, base.config.model_type, prefix_of(base))
    output = model.get_output_embeddings() if Task.of_class(type(model).__name__) is Task.CAUSAL_LM else None
    name = base.config.name_or_path or type(base).__name__
    if tokenizer is None and find_tokenizer and base.config.name_or_path:
        tokenizer = load_tokenizer(base.config.name_or_path, role=role)
    found = ModelHandle(name, base.eval(), architecture, tokenizer)
    if output is not None:
        found.output = output.weight.detach()
        found.output_bias = output.bias.detach() if getattr(output, "bias", None) is not None else None
    return found
