"""IA3: factors that multiply units one by one (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from peft_graft.errors import PlanError
from peft_graft.models.spaces import Site
from peft_graft.modules.base import Axis, Base, LabelledTensor, Module, Part, register_module


@dataclass(frozen=True, eq=False)
class ScalePart(Part):
    """Factors of a linear layer's ``output`` [d_out], or of its ``input`` [d_in]."""

    output: Tensor | None = None
    input: Tensor | None = None

    SHAPES: ClassVar = {"output": ("d_out",), "input": ("d_in",)}

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The layer's weight [d_out, d_in] and bias [d_out] with the factors inside, float64."""
        whole = weight.double()
        if self.input is not None:
            return whole * self.input.to(whole), bias
        assert self.output is not None
        return whole * self.output.to(whole)[:, None], None if bias is None else bias.double() * self.output.to(whole)


@register_module(ScalePart)
@dataclass(frozen=True)
class ScaleModule(Module):
    """Units multiplied one by one.

    Tensors: ``output`` [d] scales what a linear layer writes, or ``input`` [d] what it reads.
    """

    @property
    def width(self) -> int:
        """1: one factor a unit."""
        return 1

    @property
    def is_active(self) -> bool:
        """Whether a factor is anything but one."""
        return self.strength > 0

    @property
    def strength(self) -> float:
        """Norm of the factors less one."""
        return float(sum(float((value.double() - 1).norm()) for value in self.values.values()))

    @property
    def has_units_of_heads(self) -> bool:
        """True: every unit has a factor of its own."""
        return True

    def neutral(self) -> Self:
        """All factors one."""
        return self.with_values({name: torch.ones_like(value) for name, value in self.values.items()})

    @classmethod
    def at_site(cls, part: Part, path: str, site: Site, base: Base) -> Self:
        """The factors of a linear layer, or of the part that a role has in a fused one."""
        linear = base.linear(site, path)
        values = {
            name: value if name == "input" else base.rows_of(value, site, path, name)
            for name, value in part.tensors.items()
        }
        spaces = {"input": linear.reads, "output": linear.writes}
        return cls(
            site, {name: LabelledTensor(value, (Axis("scale", spaces[name]),)) for name, value in values.items()}
        )

    def to_part(self, base: Base) -> ScalePart:
        """The factors of a layer of its own."""
        return ScalePart(**self.values)

    @classmethod
    def joined(cls, path: str, modules: Sequence[Self], base: Base) -> ScalePart:
        """The factors of all projections."""
        first = modules[0].values
        if "input" in first:
            if not all(torch.equal(first["input"], module.values["input"]) for module in modules):
                raise PlanError("projections of one layer cannot scale their common input differently", where=path)
            return ScalePart(input=first["input"])
        whole = torch.ones(base.architecture.fused_size(modules[0].site.role), dtype=first["output"].dtype)
        for module in modules:
            whole[base.architecture.units[module.site.role]] = module.values["output"].cpu()
        return ScalePart(output=whole)
