"""Trained modules as tensors whose axes are named after the activation spaces they live in.

The idea follows git-re-basin's ``PermutationSpec``: once each axis says which space it belongs to and
whether it reads from or writes to it, moving a module to another model is one loop over axes, and every
method (copy, assignment, regression) is only another supplier of maps.

A kind of module is one file of this package. It defines a ``Part``, which is what a checkpoint's file holds of it at
one path, and a ``Module``, which is the same at a site of a model, and ties them by ``register_module``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from peft_graft.errors import CheckpointError, ModelError, PlanError
from peft_graft.models.architecture import Architecture
from peft_graft.models.spaces import Site
from peft_graft.models.spec import LM_HEAD_ROLE, LinearRole

Direction = Literal["read", "write", "scale"]


@dataclass(frozen=True)
class Axis:
    """One tensor axis in a named space.

    ``read`` axes meet incoming activations, ``write`` axes make outgoing ones, ``scale`` axes multiply the units
    of the space one by one.
    """

    direction: Direction
    space: str


@dataclass(frozen=True)
class LabelledTensor:
    """A weight and, for each of its axes, the space it lives in (``None``: an axis inside the module, left alone)."""

    values: Tensor
    axes: tuple[Axis | None, ...]

    def __post_init__(self) -> None:
        if self.values.ndim != len(self.axes):
            raise ValueError(f"{self.values.ndim} axes but {len(self.axes)} labels")


@dataclass(frozen=True, eq=False)
class Part:
    """What a checkpoint holds of one kind of module at one path, before the model is known.

    A subclass is a frozen dataclass (``eq=False``) whose tensors are fields; two parts are equal if their types and
    fields are, tensors bit for bit.
    """

    #: Whether it is virtual tokens, which are at no path of the model and change nothing in it.
    is_virtual: ClassVar[bool] = False
    #: Whether the library keeps it as a module of its own at ``PATH.NAME``, and not inside the layer at ``PATH``.
    is_own_module: ClassVar[bool] = False
    #: The matrix [width, d_in] by which it reads its input, by name, where it has one.
    reading_matrix: ClassVar[str | None] = None
    #: Axes of its tensors by name; those of one name are of one size. A number is the size itself.
    SHAPES: ClassVar[Mapping[str, tuple[str | int, ...]]] = {}

    def misfit(self) -> tuple[str, str, str] | None:
        """The first tensor whose shape does not fit ``SHAPES``: its name, what was expected, what is there."""
        return misfit(self.tensors, self.SHAPES)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def with_tensors(self, values: Mapping[str, Tensor]) -> Self:
        """A copy with other values for these of its ``tensors``."""
        return replace(self, **values)

    @property
    def is_active(self) -> bool:
        """Whether the part as it is stored can change anything."""
        return True

    @property
    def replaces_bias(self) -> bool:
        """Whether it replaces the bias of the layer at its path."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """How many vectors it puts before the text in what the model computes."""
        return 0

    @property
    def vocabulary_size(self) -> int | None:
        """How many tokens the model must have at least to take it, None where it does not matter."""
        return None

    def trains_tokens(self, path: str) -> bool:
        """Whether it changes what tokens are embedded as, or how they are predicted, at this path."""
        return False

    def trains_output(self, path: str) -> bool:
        """Whether it replaces rows of a language model's output layer, which is no part of the bare model."""
        return False

    def has_form_of(self, other: Part) -> bool:
        """Whether another part is the same but for the values of its tensors."""
        if type(self) is not type(other):
            return False
        plain = [
            field.name for field in fields(self) if isinstance(getattr(self, field.name), str | float | int | tuple)
        ]
        return self.tensors.keys() == other.tensors.keys() and all(
            getattr(self, name) == getattr(other, name) for name in plain
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Part) or not self.has_form_of(other):
            return False
        return all(torch.equal(value, other.tensors[name]) for name, value in self.tensors.items())

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class NamedPart(Part):
    """A part whose tensors are kept by their names, which are those of its module's."""

    values: Mapping[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors."""
        return dict(self.values)

    def with_tensors(self, values: Mapping[str, Tensor]) -> Self:
        """A copy with other values for these tensors."""
        return replace(self, values={**self.values, **values})


def not_the_base(what: str, where: str, *, expected: object = None, found: object = None) -> ModelError:
    """The error for a teacher that shows by its shapes or paths that the module was trained on another model."""
    return ModelError(
        f"the teacher is not the base of this module: {what}",
        where=where,
        expected=expected,
        found=found,
        fix="name the model that the module was trained on with --teacher",
    )


@dataclass(frozen=True)
class Base:
    """The model that a module belongs to, as far as kinds of modules ask about it.

    Attributes:
        tensors: the base model's tensors by path; on the meta device where only shapes are known yet.
        start: what stands before the base model's paths in the checkpoint (``bert.``).
    """

    architecture: Architecture
    tensors: Mapping[str, Tensor]
    start: str = ""

    def path(self, site: Site) -> str:
        """The path of a site as the checkpoint has it."""
        own = self.architecture.path(site)
        return own if site.role == LM_HEAD_ROLE else self.start + own

    def tensor(self, site: Site, name: str) -> Tensor | None:
        """The model's own ``weight`` or ``bias`` at a site, None where it has none or none was given."""
        return self.tensors.get(f"{self.architecture.path(site)}.{name}")

    def linear(self, site: Site, path: str) -> LinearRole:
        """The linear layer at a site.

        Raises:
            CheckpointError: there is none.
        """
        linear = self.architecture.row.linears.get(site.role)
        if linear is None:
            raise CheckpointError(f"{path} is no linear layer", where=str(site))
        return linear

    def rows_of(self, value: Tensor, site: Site, path: str, name: str) -> Tensor:
        """The rows of a linear layer's tensor that belong to the site's role, where the layer holds several.

        Raises:
            CheckpointError: there is no linear layer.
            ModelError: the tensor has another number of rows than the layer.
        """
        if not self.linear(site, path).fused:
            return value
        if len(value) != self.architecture.fused_size(site.role):
            size = self.architecture.fused_size(site.role)
            shape = list(value.shape)
            raise not_the_base(f"{name} has shape {shape}", path, expected=f"{size} rows", found=len(value))
        return value[self.architecture.units[site.role]]

    def is_fused(self, site: Site) -> bool:
        """Whether the linear layer at a site holds several roles."""
        linear = self.architecture.row.linears.get(site.role)
        return bool(linear and linear.fused)


def misfit(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[str | int, ...]]) -> tuple[str, str, str] | None:
    """The first tensor whose shape does not fit, its own or those before it.

    Args:
        shapes: axes of the tensors by name; those of one name are of one size, and a number is the size itself.

    Returns:
        The tensor's name, what was expected, what is there.
    """
    sizes: dict[str | int, int] = {}
    for name in (name for name in shapes if name in tensors):
        axes, shape = shapes[name], tensors[name].shape
        given = ", ".join(f"{axis} = {sizes[axis]}" for axis in axes if axis in sizes)
        fits = len(shape) == len(axes) and all(
            size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
            for axis, size in zip(axes, shape, strict=True)
        )
        if not fits:
            return name, f"[{', '.join(map(str, axes))}]" + f" with {given}" * bool(given), str(list(shape))
    return None


def like(own: Tensor, value: Tensor) -> Tensor:
    """A part of the base in the device and dtype of what replaces it; empty where only its shape is known."""
    return torch.empty_like(own, dtype=value.dtype) if own.is_meta else own.to(value)


@dataclass(frozen=True)
class Module(ABC):
    """What every kind of module has: where it attaches and its labelled tensors."""

    #: Tensors that are zero in a neutral module.
    ZERO_IF_NEUTRAL: ClassVar[tuple[str, ...]] = ()
    #: Tensors that replace a part of the base model, or are relative to one -> the tensor that holds that part.
    RELATIVE_TO: ClassVar[Mapping[str, str]] = {}

    site: Site
    tensors: Mapping[str, LabelledTensor]

    @property
    def values(self) -> dict[str, Tensor]:
        """The tensors without their labels."""
        return {name: tensor.values for name, tensor in self.tensors.items()}

    @property
    def axes(self) -> list[Axis]:
        """The axes that live in a named space, each once."""
        return list(dict.fromkeys(axis for tensor in self.tensors.values() for axis in tensor.axes if axis))

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """The same module with other values."""
        tensors = {name: LabelledTensor(values[name], tensor.axes) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    @property
    @abstractmethod
    def is_active(self) -> bool:
        """Whether the module can change anything: false when its output is zero for every input."""

    @property
    @abstractmethod
    def strength(self) -> float:
        """How much the module changes, as one norm: 0 for one that changes nothing."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Size of the module's inner axis: LoRA's rank, an adapter's bottleneck."""

    def neutral(self) -> Self:
        """The module with its effect switched off: it reads as before and changes nothing."""
        values = self.values
        zero = {name: torch.zeros_like(values[name]) for name in self.ZERO_IF_NEUTRAL if name in values}
        own = {name: values[base] for name, base in self.RELATIVE_TO.items() if name in values}
        return self.with_values({**values, **zero, **own})

    def untrained(self, seed: int) -> Self:
        """A module of this form as training begins with it: it changes nothing."""
        return self.neutral()

    @property
    def differs_from_base(self) -> bool:
        """Whether a value that is relative to the base model is another than the base model's own."""
        values = self.values
        return any(
            name in values and not torch.equal(values[name], values[base]) for name, base in self.RELATIVE_TO.items()
        )

    def rebased(self, own: Mapping[str, Tensor]) -> Self:
        """A moved module with the values of its own model wherever it is relative to a part of the base.

        Where the two models' parts are equal, the values arrive bit for bit.

        Args:
            own: for names of ``RELATIVE_TO``'s values, such as ``row_norm``, what the part is in the student.
        """
        values = self.values
        for name, base in self.RELATIVE_TO.items():
            if name in values and base in own:
                was, now = values[base], own[base].to(values[base])
                values[name], values[base] = self._carried_over(name, values[name], was, now), now
        return self.with_values(values)

    def _carried_over(self, name: str, value: Tensor, was: Tensor, now: Tensor) -> Tensor:
        """What a value becomes where the part of the base under it is ``now`` and was ``was``: v + (now - was)."""
        return value + (now - was)

    def in_terms_of(self, other: Module) -> Module:
        """The same module so expressed that its tensors can be added to those of another of its kind."""
        return self

    @property
    def trained_tokens(self) -> Tensor | None:
        """Ids of the tokens that it replaces one by one, int64; None for what changes no single tokens."""
        return None

    @property
    def names_tokens(self) -> bool:
        """Whether the tokens that it replaces are named, and not told by values that are unknown before weights are."""
        return False

    @property
    def has_units_of_heads(self) -> bool:
        """Whether single attention heads can be chosen of it."""
        return False

    def check_method(self, method: str) -> None:  # noqa: B027 - few kinds refuse one
        """Refuse a method by which this module cannot be moved.

        Raises:
            AlignmentError: it cannot.
        """

    def check_models(self, teacher: Architecture, student: Architecture) -> None:  # noqa: B027
        """Refuse a student that cannot receive this module whatever the method.

        Raises:
            PlanError: it cannot.
        """

    # ---- from files and to files -------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def at_site(cls, part: Part, path: str, site: Site, base: Base) -> Self:
        """The module of a part at one of its sites.

        Raises:
            CheckpointError: no module of this kind can be there.
            ModelError: a shape shows that the module was trained on another model.
            PlanError: the module needs something that the model does not have.
        """

    @abstractmethod
    def to_part(self, base: Base) -> Part:
        """The reverse of ``at_site``, for a model whose values the module may not have yet (``rebased``)."""

    @classmethod
    def from_part(cls, part: Part, path: str, sites: Sequence[Site], base: Base) -> list[Self]:
        """The modules of a part, one for each site of its path: several where a fused layer holds several roles."""
        return [cls.at_site(part, path, site, base) for site in sites]

    @classmethod
    def to_parts(cls, modules: Sequence[Self], base: Base) -> dict[str, Part]:
        """The parts of all modules of this kind, by path; a fused layer has one for all of its roles."""
        together: dict[str, list[Self]] = {}
        for module in modules:
            together.setdefault(base.path(module.site), []).append(module)
        return {
            path: cls.joined(path, group, base) if base.is_fused(group[0].site) else group[0].to_part(base)
            for path, group in together.items()
        }

    @classmethod
    def joined(cls, path: str, modules: Sequence[Self], base: Base) -> Part:
        """The part of a fused layer, from the modules of its roles.

        Raises:
            PlanError: no module of this kind can be there, or these do not go together.
        """
        raise PlanError("a module of this kind cannot be on a layer that holds several roles", where=path)


ModuleClass = TypeVar("ModuleClass", bound=type[Module])
#: What is registered: kinds of modules by what files hold of them.
MODULES: dict[type[Part], type[Module]] = {}


def register_module(*parts: type[Part]) -> Callable[[ModuleClass], ModuleClass]:
    """Make a kind of module known, by the parts that it is made of; for use as a class decorator.

    Example:
        >>> @register_module(LoraPart)
        ... class LoraModule(Module): ...
    """

    def register(kind: ModuleClass) -> ModuleClass:
        MODULES.update(dict.fromkeys(parts, kind))
        return kind

    return register


def module_of(part: Part) -> type[Module]:
    """The kind of module that a part belongs to.

    Raises:
        CheckpointError: none was registered.
    """
    if type(part) not in MODULES:
        raise CheckpointError(
            f"no kind of module is registered for {type(part).__name__}",
            where="register_module",
            expected=", ".join(sorted(known.__name__ for known in MODULES)),
            fix="register the module's class, and import its file before the checkpoint is read",
        )
    return MODULES[type(part)]
