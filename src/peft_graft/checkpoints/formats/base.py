"""What every format of checkpoints can do, and which formats there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError
from peft_graft.models.architecture import Architecture
from peft_graft.models.spaces import Site
from peft_graft.modules.base import Part

#: Files that belong to a module, whatever its format; the rest of a folder is not looked into.
FILES = ("*.json", "adapter*", "pytorch_*", "model_head*", "value_head*")
_LONGEST_NAME = 1_000
#: What leaves tensors without values, and how to get them back.
_ZERO3 = ": this is what is left where DeepSpeed's ZeRO-3 spread the weights and they were saved without being gathered"
_GATHER = (
    "save it again with stage3_gather_16bit_weights_on_model_save set to true, or get the weights back from the "
    "training run's checkpoint with its zero_to_fp32.py"
)


class Format(ABC):
    """A library's way to keep modules in files.

    A subclass names its ``library`` (``RawCheckpoint.library`` of what it reads) and is registered by
    ``register_format``. ``loading_template`` is the file in ``templates/`` that says on model cards how its checkpoints
    are loaded.
    """

    library: ClassVar[str]
    loading_template: ClassVar[str | None] = None

    @abstractmethod
    def detect(self, folder: Path) -> bool:
        """Whether a folder holds a checkpoint of this format, of any kind."""

    @abstractmethod
    def read(self, folder: Path) -> RawCheckpoint:
        """The checkpoint in a folder.

        Raises:
            CheckpointError: a kind or an option that is not supported, or missing or damaged files.
        """

    @abstractmethod
    def parse(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: str = "the module"
    ) -> RawCheckpoint:
        """A checkpoint from memory.

        Args:
            config: what the configuration file holds. tensors: what the weights file holds, by its keys.
            where: what errors name.

        Raises:
            CheckpointError: a kind or an option that is not supported, or tensors that belong to no known part.
        """

    @abstractmethod
    def build(self, raw: RawCheckpoint, names: StudentNames) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The reverse of ``parse``: the configuration and the tensors as the student's files have them.

        Raises:
            CheckpointError: the format cannot express the module.
        """

    @abstractmethod
    def write(self, folder: Path, raw: RawCheckpoint, names: StudentNames) -> None:
        """Write what ``build`` gives, in an existing folder."""

    def check_site(  # noqa: B027 - most formats refuse none
        self, path: str, sites: Sequence[Site], architecture: Architecture
    ) -> None:
        """Refuse a place where this format's modules mean something that cannot be moved.

        Raises:
            CheckpointError: the path is such a place.
        """


FormatClass = TypeVar("FormatClass", bound=type[Format])
#: By library, in the order in which folders are offered to them.
FORMATS: dict[str, Format] = {}


def register_format(cls: FormatClass) -> FormatClass:
    """Make a format known; for use as a class decorator."""
    FORMATS[cls.library] = cls()
    return cls


def format_of(library: str) -> Format:
    """The format of a library.

    Raises:
        CheckpointError: none is registered.
    """
    if library not in FORMATS:
        raise CheckpointError(
            "no format is registered for this library",
            where=library,
            expected=", ".join(FORMATS),
            fix="register it with register_format, and import its file before the checkpoint is read",
        )
    return FORMATS[library]


def check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a file without tensors, or with names that no module of a model has.

    Raises:
        CheckpointError: it is such a file.
    """
    if not tensors:
        raise CheckpointError(f"the file holds no tensors at all{_ZERO3}", where=where, fix=_GATHER)
    longest = max(tensors, key=len)
    if len(longest) > _LONGEST_NAME:
        raise CheckpointError(
            "a tensor's name is longer than any path in a model",
            where=where,
            expected=f"{_LONGEST_NAME} characters at most",
            found=len(longest),
        )


def check_values(found: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
    """Refuse a module's tensors, by path and name, that hold nothing or whole numbers.

    Raises:
        CheckpointError: there is one.
    """
    everything = {f"{path}.{name}": tensor for path, values in found.items() for name, tensor in values.items()}
    if empty := [name for name, tensor in everything.items() if not tensor.numel()]:
        raise CheckpointError(
            f"{len(empty)} of the module's {len(everything)} tensors are empty, {min(empty)} among them{_ZERO3}",
            where=where,
            fix=_GATHER,
        )
    for name, tensor in everything.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"tensor {name} holds {str(tensor.dtype).removeprefix('torch.')}, which no module is trained in",
                where=where,
                expected="float32, float16 or bfloat16",
                fix="save the module as it was before it was quantised",
            )


def check_shapes(parts: Mapping[str, Part], where: str) -> None:
    """Refuse a part whose tensors do not fit each other.

    Raises:
        CheckpointError: there is one.
    """
    for path, part in parts.items():
        if wrong := part.misfit():
            name, expected, found = wrong
            raise CheckpointError(
                f"{name} of {path} has another shape than the rest of the module",
                where=where,
                expected=expected,
                found=found,
                fix="the file is damaged, or was written by something else; save the module again with its library",
            )


def write_checkpoint(folder: Path, raw: RawCheckpoint, names: StudentNames) -> None:
    """Write a checkpoint of the student in the format that ``raw`` names."""
    format_of(raw.library).write(folder, raw, names)
