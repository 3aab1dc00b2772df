"""What AdapterHub's format asks about a kind of module: the names of its tensors, and the settings it depends on."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError
from peft_graft.modules.base import Part

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint's weights file and what its configuration says about them.

    Attributes:
        tensors: by their keys in the file. settings: of the adapter. adapter: its name.
        hidden_size: of its model, 0 where it is not said. where: what errors name.
    """

    tensors: Mapping[str, Tensor]
    settings: Settings
    adapter: str
    hidden_size: int
    where: str

    def setting(self, name: str) -> Any:
        """A setting that the weights mean nothing without.

        Raises:
            CheckpointError: it is not there.
        """
        if self.settings.get(name) is None:
            raise CheckpointError(
                f"the adapter's settings lack {name}",
                where=self.where,
                found=", ".join(self.settings),
                fix="save it again with the library's save_adapter",
            )
        return self.settings[name]


class Codec(ABC):
    """How the library keeps one kind of module; a subclass is registered by ``register_codec``."""

    #: ``RawCheckpoint.kind`` of these modules.
    kind: ClassVar[str]
    #: Settings under which the weights mean something else -> the harmless values.
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "composition_mode": ("add", "scale"),
        "use_gating": (False, None),
    }

    @abstractmethod
    def claims(self, settings: Settings) -> bool:
        """Whether a checkpoint with these settings is of this kind."""

    @abstractmethod
    def parts(self, saved: Saved) -> tuple[dict[str, Part], Settings]:
        """The parts, and settings that describe them as they are now.

        Raises:
            CheckpointError: tensors are missing, or belong to no part of this kind.
        """

    @abstractmethod
    def tensors(self, raw: RawCheckpoint, settings: Settings, names: StudentNames) -> dict[str, Tensor]:
        """The tensors by their keys in the student's file."""

    def settings(self, raw: RawCheckpoint, settings: Settings, names: StudentNames) -> dict[str, Any]:
        """The student's settings, from the teacher's with ``leave_out`` replaced."""
        return dict(settings)

    def layer(self, path: str, names: StudentNames) -> int | None:
        """The layer of a part, counted through all stacks; None for one outside the layers."""
        return names.position(path)


CodecClass = TypeVar("CodecClass", bound=type[Codec])
#: By ``RawCheckpoint.kind``.
CODECS: dict[str, Codec] = {}


def register_codec(cls: CodecClass) -> CodecClass:
    """Make known how the library keeps a kind of module; for use as a class decorator."""
    CODECS[cls.kind] = cls()
    return cls


def in_container(
    saved: Saved, container: str, kind: str, names: Mapping[str, str], needed: Collection[str] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Path -> our name -> tensor, of a file whose keys are all PATH.CONTAINER.ADAPTER.NAME.

    Args:
        names: of the tensors, the library's -> ours. needed: by our name, all where nothing is said.

    Raises:
        CheckpointError: there are other tensors, or none, or not all that are needed.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.tensors.items():
        match = re.fullmatch(rf"(.+)\.{container}\.{re.escape(saved.adapter)}\.(.+)", key)
        if match is None:
            raise CheckpointError(
                f"tensor {key} belongs to no {kind} module named {saved.adapter!r}",
                where=saved.where,
                fix="modules made of several parts are not supported yet",
            )
        if match[2] not in names:
            raise CheckpointError(f"tensor {key} is not a known part of a {kind} module", where=saved.where)
        found.setdefault(match[1], {})[names[match[2]]] = tensor
    if not found:
        raise CheckpointError(f"the file holds no {kind} weights", where=saved.where)
    wanted = set(names.values() if needed is None else needed)
    for path, values in found.items():
        if not wanted <= values.keys():
            raise CheckpointError(f"{path} lacks {', '.join(sorted(wanted - values.keys()))}", where=saved.where)
    return found


def on_fused_layer(path: str) -> CheckpointError:
    """Why a module at this path is not moved."""
    return CheckpointError(
        "AdapterHub's module on a fused layer holds some of its projections only, which cannot be moved yet",
        where=path,
        fix="train the module with peft",
    )
