"""What the format of peft asks about a kind of module: the names of its tensors, and the options it depends on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from peft_graft.checkpoints.formats.peft.options import SHARED, Options, check_options
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.modules.base import Part

#: Module path -> name after it in the file -> tensor.
Found = Mapping[str, Mapping[str, Tensor]]


class Codec(ABC):
    """How peft keeps one kind of module; a subclass is registered by ``register_codec``."""

    #: ``RawCheckpoint.kind`` of these modules.
    kind: ClassVar[str]
    #: peft's names for them.
    peft_types: ClassVar[tuple[str, ...]]
    #: The options that its configuration may have, and what they may hold; all others are refused.
    options: ClassVar[Options] = SHARED
    #: What stands before all paths in the file.
    prefix: ClassVar[str] = "base_model.model."

    def check(self, config: Mapping[str, Any], where: str) -> None:
        """Refuse options under which the weights mean something else, or may.

        Raises:
            CheckpointError: there is one.
        """
        check_options(config, self.options, where)

    def is_copy(self, path: str) -> bool:
        """Whether a tensor says nothing that no other does: the base model's own, or one that is saved twice."""
        return False

    @abstractmethod
    def place(self, path: str) -> tuple[str, str] | None:
        """A tensor's module path and its name there; None for one that is no part of such a module."""

    @abstractmethod
    def parts(self, found: Found, config: Mapping[str, Any], where: str) -> dict[str, Part]:
        """The parts of all tensors that have a ``place``.

        Raises:
            CheckpointError: tensors are missing or do not fit each other.
        """

    @abstractmethod
    def tensors(self, parts: Mapping[str, Part]) -> dict[str, Tensor]:
        """The reverse of ``place`` and ``parts``: tensors by their path in the file."""

    def saved_whole(self, parts: Mapping[str, Part]) -> Collection[str]:
        """What peft lists under ``modules_to_save`` for parts that are saved whole: names, or whole paths."""
        return ()

    def targets(self, parts: Mapping[str, Part]) -> Collection[str]:
        """Paths that peft lists under ``target_modules``."""
        return list(parts)

    def config(self, raw: RawCheckpoint, config: dict[str, Any], names: StudentNames) -> dict[str, Any]:
        """The student's configuration.

        Args:
            config: the teacher's with all that does not depend on the kind replaced already.
        """
        return {**config, "target_modules": names.shortest_targets(self.targets(raw.parts))}


CodecClass = TypeVar("CodecClass", bound=type[Codec])
#: By ``RawCheckpoint.kind``.
CODECS: dict[str, Codec] = {}


def register_codec(cls: CodecClass) -> CodecClass:
    """Make known how peft keeps a kind of module; for use as a class decorator."""
    CODECS[cls.kind] = cls()
    return cls


def codec_of_type(peft_type: str) -> Codec | None:
    """What reads modules of a type of peft, None for one that no kind of module is registered for."""
    return next((codec for codec in CODECS.values() if peft_type in codec.peft_types), None)
