"""Invertible parts of AdapterHub's language adapters (MAD-X, Pfeiffer et al. 2020, arXiv 2005.00052).

What the embeddings give is split in two halves, each of which is changed by a small network of the other (NICE, Dinh et
al. 2014, arXiv 1410.8516). Which half a unit is in is its place among the units, so only a student with the
teacher's units in the teacher's order can compute it: it is copied there, and refused elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from peft_graft.errors import AlignmentError, CheckpointError, PlanError
from peft_graft.models.architecture import Architecture
from peft_graft.models.spaces import EMBEDDED, Site, Space
from peft_graft.modules.base import Base, LabelledTensor, Module, NamedPart, Part, register_module

_PARAMETERS = tuple(f"{part}.{at}.{name}" for part in "FG" for at in (0, 2) for name in ("weight", "bias"))
_LAST = tuple(name for name in _PARAMETERS if ".2." in name)
_FIX = "move the rest of the module, with --sites '*.adapter'"


@dataclass(frozen=True, eq=False)
class InvertiblePart(NamedPart):
    """The two networks' tensors."""

    is_own_module: ClassVar = True
    SHAPES: ClassVar = {
        "F.0.weight": ("b", "second"),
        "F.0.bias": ("b",),
        "F.2.weight": ("first", "b"),
        "F.2.bias": ("first",),
        "G.0.weight": ("c", "first"),
        "G.0.bias": ("c",),
        "G.2.weight": ("second", "c"),
        "G.2.bias": ("second",),
    }

    @property
    def is_active(self) -> bool:
        """Whether a network gives anything but zero."""
        return any(bool(self.values[name].any()) for name in _LAST if name in self.values)


@register_module(InvertiblePart)
@dataclass(frozen=True)
class CouplingModule(Module):
    """One coupling block of d units: ``F`` changes their first half by the second, then ``G`` the second by the first.

    Tensors: ``F.0.weight`` [b, d - d//2], ``F.0.bias`` [b], ``F.2.weight`` [d//2, b], ``F.2.bias`` [d//2], and the same
    for ``G`` with the halves exchanged. No axis lives in a named space, for each is only a half of one.
    """

    ZERO_IF_NEUTRAL: ClassVar = _LAST

    @property
    def width(self) -> int:
        """Inner size b of the first network."""
        return len(self.tensors["F.0.weight"].values)

    @property
    def is_active(self) -> bool:
        """Whether a network gives anything but zero."""
        return any(bool(self.tensors[name].values.any()) for name in _LAST)

    @property
    def strength(self) -> float:
        """Norm of the products of the networks' two matrices."""
        values = {name: value.double() for name, value in self.values.items()}
        return float(sum(float((values[f"{part}.2.weight"] @ values[f"{part}.0.weight"]).norm()) for part in "FG"))

    def check_method(self, method: str) -> None:
        """Refuse to move a coupling block in any other way than copying."""
        if method != "copy":
            raise AlignmentError(
                "an invertible part splits the embeddings' units in two halves by their order, so it can only be "
                "copied",
                where=str(self.site),
                expected="--method copy, and a student with the teacher's embeddings",
                found=method,
                fix=_FIX,
            )

    def check_models(self, teacher: Architecture, student: Architecture) -> None:
        """Refuse a student whose embeddings have another number of units."""
        expected, found = (model.sizes.get(Space(-1, EMBEDDED), 0) for model in (teacher, student))
        if expected != found:
            raise PlanError(
                "an invertible part can only be copied, to embeddings of the same size",
                where=str(self.site),
                expected=f"{expected} units in the student",
                found=found,
                fix=_FIX,
            )

    @classmethod
    def at_site(cls, part: Part, path: str, site: Site, base: Base) -> Self:
        """The block behind the embeddings."""
        values, size = part.tensors, base.architecture.size(Space(-1, EMBEDDED))
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
        return cls(site, {name: LabelledTensor(values[name], (None,) * values[name].ndim) for name in _PARAMETERS})

    def to_part(self, base: Base) -> InvertiblePart:
        """The tensors as they are."""
        return InvertiblePart(self.values)
