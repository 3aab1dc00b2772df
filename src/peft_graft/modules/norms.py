"""LN tuning: trained layer norms (Zhao et al. 2023, arXiv 2312.11420)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from peft_graft.errors import CheckpointError, PlanError
from peft_graft.models.norms import SPACE_OF_NORM
from peft_graft.models.spaces import Site
from peft_graft.modules.base import Axis, Base, LabelledTensor, Module, Part, like, register_module


@dataclass(frozen=True, eq=False)
class NormPart(Part):
    """A norm's ``weight`` and ``bias``, [d] each, in place of the base model's."""

    weight: Tensor | None = None
    bias: Tensor | None = None

    SHAPES: ClassVar = {"weight": ("d",), "bias": ("d",)}


@register_module(NormPart)
@dataclass(frozen=True)
class NormModule(Module):
    """A trained layer norm.

    Tensors: ``weight`` [d] scales, ``bias`` [d] writes, each beside what it was in the base model, ``weight_was`` and
    ``bias_was``.
    """

    RELATIVE_TO: ClassVar = {"weight": "weight_was", "bias": "bias_was"}

    @property
    def width(self) -> int:
        """1: one value a unit."""
        return 1

    @property
    def is_active(self) -> bool:
        """Whether a value differs from the base model's."""
        return self.differs_from_base

    @property
    def strength(self) -> float:
        """Norm of the change of the weights."""
        return float((self.tensors["weight"].values.double() - self.tensors["weight_was"].values.double()).norm())

    @classmethod
    def at_site(cls, part: Part, path: str, site: Site, base: Base) -> Self:
        """The norm's values beside those of the base model."""
        stack = base.architecture.row.stack(site.role)
        name = SPACE_OF_NORM.get(stack.local(site.role) or "")
        if name is None:
            raise CheckpointError(f"{path} is no layer norm", where=str(site))
        space = stack.full(name)
        axes = {"weight": Axis("scale", space), "bias": Axis("write", space)}
        values = part.tensors | _base_values(part.tensors, site, base)
        return cls(
            site, {name: LabelledTensor(value, (axes[name.removesuffix("_was")],)) for name, value in values.items()}
        )

    def to_part(self, base: Base) -> NormPart:
        """The values as far from the student's own as they were from the teacher's."""
        own = self.rebased(_base_values(self.values, self.site, base)).values
        return NormPart(own.get("weight"), own.get("bias"))


def _base_values(values: Mapping[str, Tensor], site: Site, base: Base) -> dict[str, Tensor]:
    found = {}
    for name in (name for name in ("weight", "bias") if name in values):
        own = base.tensor(site, name)
        if own is None:
            raise PlanError(
                f"the module trains a norm's {name} that this model does not have",
                where=f"{base.architecture.model_type} {site}",
                fix="choose a student whose norms are of the same kind, or move a LoRA",
            )
        found[f"{name}_was"] = like(own, values[name])
    return found
