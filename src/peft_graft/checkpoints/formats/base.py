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


def write_checkpoint(folder: Path, raw: RawCheckpoint, names: StudentNames) -> None:
    """Write a checkpoint of the student in the format that ``raw`` names."""
    format_of(raw.library).write(folder, raw, names)
