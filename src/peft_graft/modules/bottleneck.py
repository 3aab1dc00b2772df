"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00247)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from peft_graft.errors import CheckpointError
from peft_graft.models.spaces import Site
from peft_graft.modules.base import Axis, Base, LabelledTensor, Module, NamedPart, Part, register_module

#: Where beside its block an adapter is: the names of ``AdapterPoint``'s spaces.
Placement = Literal["before_norm", "after_norm", "parallel"]


@dataclass(frozen=True, eq=False)
class BottleneckPart(NamedPart):
    """An adapter's tensors, and where it is."""

    placement: Placement = "before_norm"

    is_own_module: ClassVar = True
    reading_matrix: ClassVar = "down.weight"
    SHAPES: ClassVar = {
        "down.weight": ("b", "d"),
        "down.bias": ("b",),
        "up.weight": ("d", "b"),
        "up.bias": ("d",),
        **{f"norm_{side}.{name}": ("d",) for side in ("before", "after") for name in ("weight", "bias")},
        "gate.weight": (1, "d"),
        "gate.bias": (1,),
        "scaling": ("scaling",),
    }

    @property
    def is_active(self) -> bool:
        """Whether the up projection is anything but zero."""
        return any(bool(value.any()) for name, value in self.values.items() if name.startswith("up."))


@register_module(BottleneckPart)
@dataclass(frozen=True)
class BottleneckModule(Module):
    """Bottleneck adapter, y = up(f(down(x))) + residual.

    Tensors: ``down.weight`` [b, d] reads, ``down.bias`` [b], ``up.weight`` [d, b] and ``up.bias`` [d] write; optional
    ``norm_before.*`` [d] read, ``norm_after.*`` [d] write, ``gate.weight`` [1, d] reads, ``gate.bias`` [1],
    ``scaling`` [1], or [d] and then it writes.
    """

    ZERO_IF_NEUTRAL: ClassVar = ("down.bias", "up.weight", "up.bias")
    placement: Placement = "before_norm"

    @property
    def width(self) -> int:
        """The bottleneck size b."""
        return self.tensors["down.weight"].values.shape[0]

    @property
    def is_active(self) -> bool:
        """Whether the up projection is anything but zero."""
        return any(bool(self.tensors[name].values.any()) for name in ("up.weight", "up.bias"))

    @property
    def strength(self) -> float:
        """Frobenius norm of the product of the two projections."""
        up, down = (self.tensors[name].values.double() for name in ("up.weight", "down.weight"))
        return float((up @ down).norm())

    @classmethod
    def at_site(cls, part: Part, path: str, site: Site, base: Base) -> Self:
        """The adapter after, or beside, a block."""
        assert isinstance(part, BottleneckPart)
        point = base.architecture.row.adapters.get(site.role)
        if point is None:
            raise CheckpointError(f"{path} is no place of a bottleneck adapter", where=str(site))
        return cls(site, bottleneck_tensors(part.values, getattr(point, part.placement)), part.placement)

    def to_part(self, base: Base) -> BottleneckPart:
        """The tensors as they are: nothing in them is relative to the base model."""
        return BottleneckPart(self.values, self.placement)


def bottleneck_tensors(values: Mapping[str, Tensor], space: str) -> dict[str, LabelledTensor]:
    """Label an adapter's tensors; it reads and writes one residual space."""
    read, write = Axis("read", space), Axis("write", space)
    axes: dict[str, tuple[Axis | None, ...]] = {
        "down.weight": (None, read),
        "down.bias": (None,),
        "up.weight": (write, None),
        "up.bias": (write,),
        "norm_before.weight": (read,),
        "norm_before.bias": (read,),
        "norm_after.weight": (write,),
        "norm_after.bias": (write,),
        "gate.weight": (None, read),
        "gate.bias": (None,),
        "scaling": (write,) if values.get("scaling", torch.empty(1)).numel() > 1 else (None,),
    }
    return {name: LabelledTensor(value, axes[name]) for name, value in values.items()}
