"""What a plan is made from: the module and the two models, each given by name or as a live object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from peft_graft.alignment.activations import MAX_LENGTH, tokenize
from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.text import Sample
from peft_graft.checkpoints.convert import as_lora, stand_in
from peft_graft.checkpoints.live import is_peft_model, read_live
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import locate, read_checkpoint
from peft_graft.checkpoints.task import with_problem_type, with_task
from peft_graft.config import GraftConfig, PairConfig
from peft_graft.errors import AlignmentError, CheckpointError, ModelError
from peft_graft.models.devices import check_device
from peft_graft.models.loading import (
    ModelHandle,
    ModelPair,
    blank_handle,
    check_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    wrap_model,
)
from peft_graft.models.pair import loading_of
from peft_graft.models.task_models import quiet_libraries

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

#: A model by folder or hub id, or a live model of transformers.
ModelLike = str | Path | nn.Module
#: The teacher's and the student's tokenizer, for live models.
Tokenizers = tuple["PreTrainedTokenizerBase | None", "PreTrainedTokenizerBase | None"]


@dataclass(frozen=True)
class ModuleSource:
    """The trained module.

    Attributes:
        name: as the user gave it. raw: what its files say. folder: where they are, None for a live model.
        base: the model that it was trained on, as the files name it or as the live model has it.
    """

    name: str
    raw: RawCheckpoint
    folder: Path | None
    base: ModelLike | None

    @staticmethod
    def of(adapter: str | Path | nn.Module, config: GraftConfig) -> ModuleSource:
        """Find and read a module.

        Args:
            adapter: folder, hub id, or a live ``peft.PeftModel``, which is not touched.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        if isinstance(adapter, str | Path):
            folder = locate(adapter, revision=config.revision, subfolder=config.subfolder, token=config.token)
            raw = read_checkpoint(folder)
            return ModuleSource(str(adapter), raw, folder, raw.base_model)
        if is_peft_model(adapter):
            raw, base = read_live(adapter)
            return ModuleSource("a live PeftModel", raw, None, base)
        raise CheckpointError(
            "not a trained module",
            expected="a folder, a hub id, or a peft.PeftModel",
            found=type(adapter).__name__,
            fix="save the module with its library and give the folder",
        )

    @property
    def is_converted(self) -> bool:
        """Whether the module is of a kind that becomes a LoRA before it moves."""
        return self.raw.needs_conversion

    def teacher(self, named: ModelLike | None) -> ModelLike:
        """The model that it was trained on: its own base unless another is named.

        Raises:
            ModelError: neither names one.
        """
        base = self.base if named is None else named
        if base is None:
            raise ModelError(
                "the module's configuration names no base model", where=self.name, fix="name it with --teacher"
            )
        return base

    def of_teacher(self, teacher: ModelHandle, config: GraftConfig) -> ModuleSource:
        """The same with its task and what its head's outputs are, where only other things show it (``with_task``)."""
        raw = with_task(self.raw, teacher.architecture)
        return replace(self, raw=with_problem_type(raw, config.problem_type, teacher.base.config))

    def shapes(self, teacher: PretrainedConfig) -> RawCheckpoint:
        """The module to plan with, before weights are loaded."""
        return stand_in(self.raw, teacher) if self.is_converted else self.raw

    def values(self, teacher: ModelHandle) -> RawCheckpoint:
        """The module with its values, as a LoRA where it is of a kind that is converted."""
        return as_lora(self.raw, teacher) if self.is_converted else self.raw

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was saved with a module that trains tokens."""
        if self.folder is None or not self.raw.trains_tokens or not (self.folder / "tokenizer_config.json").is_file():
            return None
        return load_tokenizer(str(self.folder), role="module")


@dataclass(frozen=True)
class ModelSources:
    """Teacher and student by name or live, with the config that says how they are loaded."""

    teacher: ModelLike
    student: ModelLike
    config: PairConfig
    tokenizers: Tokenizers = (None, None)

    @staticmethod
    def of(
        module: ModuleSource,
        teacher: ModelLike | None,
        student: ModelLike,
        config: PairConfig,
        tokenizers: Tokenizers | None,
    ) -> ModelSources:
        """The models of a transfer; the teacher is the module's own base unless it is named.

        Raises:
            ModelError: neither names a teacher.
        """
        if tokenizers is not None and not (isinstance(tokenizers, tuple | list) and len(tokenizers) == 2):
            raise ModelError(
                "these are not the tokenizers of two models",
                where="tokenizers",
                expected="(teacher's, student's), None for one that lies where its model does",
                found=type(tokenizers).__name__,
            )
        return ModelSources(module.teacher(teacher), student, config, tokenizers or (None, None))

    @quiet_libraries()
    def described(self) -> ModelPair:
        """Both models without weights, from their configurations; live ones as they are.

        Raises:
            DeviceError: a device that they would be loaded to does not exist.
            ModelError: a model cannot be reached. ArchitectureError: its architecture is unknown.
        """
        first, second = (described(model, self.config, role, tokenizer) for model, tokenizer, role in self._sides)
        return ModelPair(first, second)

    @quiet_libraries()
    def loaded(self, *, tokenizers: bool) -> ModelPair:
        """Both models with weights.

        Args:
            tokenizers: whether text is read; a live model's is found by its name where it was not given.

        Raises:
            ModelError, DeviceError, ArchitectureError: see ``loading.load_model``.
        """
        return ModelPair(self.load("teacher", tokenizers=tokenizers), self.load("student", tokenizers=tokenizers))

    def load(self, role: str, *, tokenizers: bool) -> ModelHandle:
        """The teacher or the student alone; arguments and errors as for ``loaded``."""
        model, tokenizer, _ = next(side for side in self._sides if side[2] == role)
        if isinstance(model, nn.Module):
            return wrap_model(model, tokenizer, find_tokenizer=tokenizers, role=role)
        return load_model(str(model), loading_of(self.config, role), role=role, tokenizer=tokenizers)

    def tokenizer_pair(self) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
        """Both tokenizers, before any weights.

        Raises:
            ModelError: there is none, or a slow one.
        """
        first, second = (self._tokenizer(*side) for side in self._sides)
        return first, second

    def check_tokenizers(self, shapes: ModelPair, samples: Sequence[Sample] = ()) -> None:
        """Refuse tokenizers that cannot be loaded, or that give tokens unknown to their models, before weights are.

        Args:
            shapes: of the models. samples: text that they will read.

        Raises:
            ModelError: there is none, or a slow one, or one that gives such a token.
        """
        for (_, _, role), handle in zip(self._sides, (shapes.teacher, shapes.student), strict=True):
            found = self.tokenizer_of(role)
            if found is not None and len(found) > (handle.architecture.num_embeddings or len(found)):
                tokenize(replace(handle, tokenizer=found), samples, MAX_LENGTH)

    def tokenizer_of(self, role: str) -> PreTrainedTokenizerBase | None:
        """The teacher's or the student's tokenizer before any weights; None of a live model that came without.

        Raises:
            ModelError: there is none, or a slow one.
        """
        model, given, _ = next(side for side in self._sides if side[2] == role)
        return None if isinstance(model, nn.Module) and given is None else self._tokenizer(model, given, role)

    @cached_property
    def _read(self) -> dict[str, PreTrainedTokenizerBase]:
        """Tokenizers by role, as they have been read: large vocabularies take a second each."""
        return {}

    def _tokenizer(self, model: ModelLike, given: PreTrainedTokenizerBase | None, role: str) -> PreTrainedTokenizerBase:
        if role not in self._read:
            self._read[role] = self._read_tokenizer(model, given, role)
        return self._read[role]

    def _read_tokenizer(
        self, model: ModelLike, given: PreTrainedTokenizerBase | None, role: str
    ) -> PreTrainedTokenizerBase:
        if given is not None:
            return check_tokenizer(given, "", role)
        if isinstance(model, nn.Module):
            name = str(getattr(getattr(model, "config", None), "name_or_path", ""))
            if not name:
                raise ModelError(
                    "the model came without its tokenizer", where=role, fix="pass tokenizers=(teacher's, student's)"
                )
            return load_tokenizer(name, role=role)
        return load_tokenizer(str(model), loading_of(self.config, role), role=role)

    @property
    def _sides(self) -> list[tuple[ModelLike, PreTrainedTokenizerBase | None, str]]:
        return [(self.teacher, self.tokenizers[0], "teacher"), (self.student, self.tokenizers[1], "student")]


def described(
    model: ModelLike, config: PairConfig, role: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> ModelHandle:
    """A model without weights, from its configuration; a live one as it is.

    Raises:
        DeviceError, ModelError, ArchitectureError: see ``ModelSources.described``.
    """
    if isinstance(model, nn.Module):
        return wrap_model(model, tokenizer, role=role)
    if not isinstance(model, str | Path):
        raise ModelError(
            "this is no model",
            where=role,
            expected="a folder, a hub id, or a live model of transformers",
            found=type(model).__name__,
        )
    loading = loading_of(config, role)
    check_device(loading.device)
    return blank_handle(load_config(str(model), loading, role=role), str(model), loading)


def given_alignment(alignment: str | Path | Alignment | None, token: str | None = None) -> Alignment | None:
    """The alignment that a user gave, by folder, hub id or as it is.

    Raises:
        AlignmentError: there is none of that name.
    """
    if isinstance(alignment, str | Path):
        return Alignment.from_pretrained(alignment, token=token)
    if alignment is not None and not isinstance(alignment, Alignment):
        raise AlignmentError(
            "this is no alignment",
            where="alignment",
            expected="a folder, a hub id, or a peft_graft.Alignment",
            found=type(alignment).__name__,
        )
    return alignment


def config_of_live(config: GraftConfig, student: ModelLike) -> GraftConfig:
    """The config with the device and dtype that a live student has: its forward passes run as it is."""
    if not isinstance(student, nn.Module):
        return config
    weight = next(student.parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    known = dtype in ("float32", "float16", "bfloat16")
    return config.model_copy(update={"device": str(weight.device), **({"dtype": dtype} if known else {})})
