"""Invertible parts of AdapterHub's language adapters (MAD-X, Pfeiffer et al. 2020, arXiv 2005.00052).

What the embeddings give is split in two halves, each of which is changed by a small network of the other (NICE, Dinh et
al. 2014, arXiv 1410.8516). Which half a unit is in is its place among the units, so only a student with the
teacher's units in the teacher's order can compute it: it is copied there, and refused elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from peft_graft.errors import AlignmentError, CheckpointError, PlanError
from peft_graft.models.spaces import Site
from peft_graft.modules.base import LabelledTensor, Module

_PARAMETERS = tuple(f"{part}.{at}.{name}" for part in "FG" for at in (0, 2) for name in ("weight", "bias"))


@dataclass(frozen=True)
class CouplingModule(Module):
    """One coupling block of d units: ``F`` changes their first half by the second, then ``G`` the second by the first.

    Tensors: ``F.0.weight`` [b, d - d//2], ``F.0.bias`` [b], ``F.2.weight`` [d//2, b], ``F.2.bias`` [d//2], and the same
    for ``G`` with the halves exchanged. No axis lives in a named space, for each is only a half of one.
    """

    _ZERO_WHEN_IDLE: ClassVar = ("F.2.weight", "F.2.bias", "G.2.weight", "G.2.bias")

    @property
    def width(self) -> int:
        """Inner size b of the first network."""
        return len(self.tensors["F.0.weight"].values)

    @property
    def acts(self) -> bool:
        """Whether a network gives anything but zero."""
        return any(bool(self.tensors[name].values.any()) for name in self._ZERO_WHEN_IDLE)

    @property
    def strength(self) -> float:
        """Norm of the products of the networks' two matrices."""
        values = {name: tensor.values.double() for name, tensor in self.tensors.items()}
        return float(sum(float((values[f"{part}.2.weight"] @ values[f"{part}.0.weight"]).norm()) for part in "FG"))


def coupling(site: Site, values: Mapping[str, Tensor], size: int) -> CouplingModule:
    """The module of a checkpoint's tensors for embeddings of ``size`` units.

    Raises:
        CheckpointError: tensors are missing, or are of another model.
    """
    if set(_PARAMETERS) != set(values):
        raise CheckpointError(
            "the invertible part is not complete",
            where=str(site),
            expected=", ".join(_PARAMETERS),
            found=", ".join(values),
            fix="save the adapter again with the library adapters",
        )
    found = values["F.0.weight"].shape[1] + values["F.2.weight"].shape[0]
    if found != size:
        raise CheckpointError(
            "the invertible part belongs to another model",
            where=str(site),
            expected=f"{size} units",
            found=found,
            fix="name the model that the module was trained on with --teacher",
        )
    return CouplingModule(
        site, {name: LabelledTensor(values[name], (None,) * values[name].ndim) for name in _PARAMETERS}
    )


_FIX = "move the rest of the module, with --sites '*.adapter'"


def check_copied(module: Module, method: str) -> None:
    """Refuse to move a coupling block in any other way than copying.

    Raises:
        AlignmentError: it is one, and the method aligns.
    """
    if isinstance(module, CouplingModule) and method != "copy":
        raise AlignmentError(
            "an invertible part splits the embeddings' units in two halves by their order, so it can only be copied",
            where=str(module.site),
            expected="--method copy, and a student with the teacher's embeddings",
            found=method,
            fix=_FIX,
        )


def check_embeddings(module: Module, teacher: int, student: int) -> None:
    """Refuse a coupling block where the models' embeddings have another number of units.

    Raises:
        PlanError: they do.
    """
    if isinstance(module, CouplingModule) and teacher != student:
        raise PlanError(
            "an invertible part can only be copied, to embeddings of the same size",
            where=str(module.site),
            expected=f"{teacher} units in the student",
            found=student,
            fix=_FIX,
        )
