"""Trained modules as tensors whose axes are named after the activation spaces they live in.

The idea follows git-re-basin's ``PermutationSpec``: once each axis says which space it belongs to and
whether it reads from or writes to it, moving a module to another model is one loop over axes, and every
method (copy, assignment, regression) is only another supplier of maps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peft_graft.errors import PlanError
from peft_graft.models.spaces import Site
from peft_graft.models.tasks import Task

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


#: Values that replace a part of the base model, or are relative to one -> the tensor beside them that holds that part.
BASE_OF: Mapping[str, str] = {
    "magnitude": "row_norm",
    "base_bias": "base_bias_was",
    "norm.weight": "norm.weight_was",
    "norm.bias": "norm.bias_was",
    "rows": "rows_was",
}


@dataclass(frozen=True)
class Module:
    """What every module kind has: where it attaches and its labelled tensors."""

    site: Site
    tensors: Mapping[str, LabelledTensor]

    @property
    def spaces(self) -> frozenset[str]:
        """Names of the spaces in which the module's axes live."""
        return frozenset(axis.space for tensor in self.tensors.values() for axis in tensor.axes if axis)

    def with_values(self, values: Mapping[str, Tensor], site: Site | None = None) -> Module:
        """The same kind of module with other values (axes kept), optionally at another site."""
        tensors = {name: LabelledTensor(values[name], tensor.axes) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, site=site or self.site)

    @property
    def acts(self) -> bool:
        """Whether the module can change anything: false when its output is zero for every input."""
        raise NotImplementedError

    #: Tensors that are zero in a module that changes nothing but reads as before.
    _ZERO_WHEN_IDLE: ClassVar[tuple[str, ...]] = ()

    def idle(self) -> Module:
        """The module with its output switched off: LoRA's B, an adapter's up projection and biases are zero."""
        values = {name: tensor.values for name, tensor in self.tensors.items()}
        zero = {name: torch.zeros_like(values[name]) for name in self._ZERO_WHEN_IDLE if name in values}
        was = {name: values[of] for name, of in BASE_OF.items() if name in values}
        return self.with_values({**values, **zero, **was})

    @property
    def strength(self) -> float:
        """How much the module changes, as one norm: 0 for one that changes nothing."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Size of the module's inner axis: LoRA's rank, an adapter's bottleneck."""
        raise NotImplementedError


@dataclass(frozen=True)
class LoraModule(Module):
    """Low-rank update of a linear layer, y += scaling * B A x (Hu et al. 2021, arXiv 2106.09685).

    Tensors: ``A`` [r, d_in] reads, ``B`` [d_out, r] writes, optionally ``bias`` [d_out] of B, which writes and is
    scaled like it. DoRA (Liu et al. 2024, arXiv 2402.09353) has ``magnitude`` [d_out], which scales the output, beside
    ``row_norm`` [d_out], the norms of the rows of W + scaling * B A that it stands for. A trained bias of the linear
    layer itself is ``base_bias`` [d_out], beside ``base_bias_was``. ``scaling`` is alpha / r, or alpha / sqrt(r) for
    rank-stabilised LoRA.
    """

    _ZERO_WHEN_IDLE: ClassVar = ("B", "bias")
    scaling: float = 1.0

    @property
    def width(self) -> int:
        """The rank r."""
        return self.tensors["A"].values.shape[0]

    @property
    def acts(self) -> bool:
        """Whether the update, or a value beside it, is anything but zero."""
        product = all(bool(self.tensors[name].values.any()) for name in ("A", "B"))
        added = "bias" in self.tensors and bool(self.tensors["bias"].values.any())
        return (self.scaling != 0 and (product or added)) or _differs_from_base(self)

    @property
    def strength(self) -> float:
        """Frobenius norm of the update scaling * B A."""
        return float(self.delta().norm())

    def delta(self) -> Tensor:
        """The update as one matrix, scaling * B A, [d_out, d_in], float64."""
        return self.scaling * (self.tensors["B"].values.double() @ self.tensors["A"].values.double())

    def rescaled(self, scaling: float) -> LoraModule:
        """The same update expressed with another scaling factor; B and its bias take the ratio."""
        if scaling == self.scaling:
            return self
        ratio = self.scaling / scaling
        values = {
            name: (tensor.values.double() * ratio).to(tensor.values.dtype) if name in ("B", "bias") else tensor.values
            for name, tensor in self.tensors.items()
        }
        scaled = replace(self, scaling=scaling).with_values(values)
        assert isinstance(scaled, LoraModule)
        return scaled


@dataclass(frozen=True)
class BottleneckModule(Module):
    """Bottleneck adapter, y = up(f(down(x))) + residual (Houlsby et al. 2019; Pfeiffer et al. 2020).

    Tensors: ``down.weight`` [b, d] reads, ``down.bias`` [b], ``up.weight`` [d, b] and ``up.bias`` [d] write; optional
    ``norm_before.*`` [d] read, ``norm_after.*`` [d] write, ``gate.weight`` [1, d] reads, ``gate.bias`` [1],
    ``scaling`` [1], or [d] and then it writes.
    """

    _ZERO_WHEN_IDLE: ClassVar = ("down.bias", "up.weight", "up.bias")

    @property
    def width(self) -> int:
        """The bottleneck size b."""
        return self.tensors["down.weight"].values.shape[0]

    @property
    def acts(self) -> bool:
        """Whether the up projection is anything but zero."""
        return any(bool(self.tensors[name].values.any()) for name in ("up.weight", "up.bias"))

    @property
    def strength(self) -> float:
        """Frobenius norm of the product of the two projections."""
        up, down = (self.tensors[name].values.double() for name in ("up.weight", "down.weight"))
        return float((up @ down).norm())


@dataclass(frozen=True)
class ScaleModule(Module):
    """Units multiplied one by one (IA3, Liu et al. 2022, arXiv 2205.05638).

    Tensors: ``output`` [d] scales what a linear layer writes, or ``input`` [d] what it reads.
    """

    @property
    def width(self) -> int:
        """1: one factor a unit."""
        return 1

    @property
    def acts(self) -> bool:
        """Whether a factor is anything but one."""
        return self.strength > 0

    @property
    def strength(self) -> float:
        """Norm of the factors less one."""
        return float(sum(float((tensor.values.double() - 1).norm()) for tensor in self.tensors.values()))

    def idle(self) -> Module:
        """All factors one."""
        return self.with_values({name: torch.ones_like(tensor.values) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class NormModule(Module):
    """A trained layer norm (LN tuning, arXiv 2312.11420).

    Tensors: ``norm.weight`` [d] scales, ``norm.bias`` [d] writes, each beside what it was in the base model,
    ``norm.weight_was`` and ``norm.bias_was``.
    """

    @property
    def width(self) -> int:
        """1: one value a unit."""
        return 1

    @property
    def acts(self) -> bool:
        """Whether a value differs from the base model's."""
        return _differs_from_base(self)

    @property
    def strength(self) -> float:
        """Norm of the change of the weights."""
        tensors = self.tensors
        return float((tensors["norm.weight"].values.double() - tensors["norm.weight_was"].values.double()).norm())


@dataclass(frozen=True)
class PromptModule(Module):
    """Virtual tokens before the text.

    Tensors: ``embeddings`` [n, d] write among the word embeddings (prompt tuning, Lester et al. 2021; p-tuning, Liu et
    al. 2021), or ``key`` and ``value`` [n, d_kv] write among a layer's keys and values (prefix tuning, Li and Liang
    2021).
    """

    @property
    def width(self) -> int:
        """Number of virtual tokens."""
        return len(next(iter(self.tensors.values())).values)

    @property
    def acts(self) -> bool:
        """True: a token more is never nothing."""
        return True

    @property
    def strength(self) -> float:
        """Norm of the vectors."""
        return float(sum(float(tensor.values.double().norm()) for tensor in self.tensors.values()))

    def idle(self) -> Module:
        """Vectors of zero, which is as near to nothing as a virtual token comes."""
        return self.with_values({name: torch.zeros_like(tensor.values) for name, tensor in self.tensors.items()})


def _differs_from_base(module: Module) -> bool:
    values = {name: tensor.values for name, tensor in module.tensors.items()}
    return any(name in values and not torch.equal(values[name], values[of]) for name, of in BASE_OF.items())


def settled(module: Module, base: Mapping[str, Tensor]) -> Module:
    """A moved module with values of its own model wherever it is relative to a part of the base.

    m_s = map(m_t) * n_s / map(n_t) for DoRA's magnitudes, v_s = map(v_t) + (b_s - map(b_t)) for values that replace
    the base's: where the two models' parts are equal, the values arrive bit for bit.

    Args:
        base: for names of ``BASE_OF``'s values, such as ``row_norm``, what the part is in the student.
    """
    values = {name: tensor.values for name, tensor in module.tensors.items()}
    for name, of in BASE_OF.items():
        if name not in values or of not in base:
            continue
        own = base[of].to(values[of])
        values[name] = values[name] * (own / values[of]) if name == "magnitude" else values[name] + (own - values[of])
        values[of] = own
    return module.with_values(values)


@dataclass(frozen=True)
class Head:
    """A classification head: an optional inner layer and an output layer.

    ``out.weight`` [labels, d], ``out.bias`` [labels] and optionally ``dense.weight`` [h, d], ``dense.bias`` [h],
    followed by ``activation``; then ``out.weight`` is [labels, h]. ``reads`` names the space it reads: the last hidden
    state of every token, of the first token, or the pooler's output.
    """

    task: Task
    tensors: Mapping[str, LabelledTensor]
    reads: str
    labels: tuple[str, ...]
    activation: str | None = None

    @property
    def has_inner_layer(self) -> bool:
        """Whether a dense layer stands before the output layer."""
        return "dense.weight" in self.tensors

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return self.tensors["out.weight"].values.shape[0]

    def with_values(self, values: Mapping[str, Tensor]) -> Head:
        """The same head with other values, axes kept."""
        tensors = {name: LabelledTensor(values[name], tensor.axes) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)


def lora_tensors(values: Mapping[str, Tensor], reads: str, writes: str) -> dict[str, LabelledTensor]:
    """Label a LoRA's tensors by name (``LoraModule``): A reads ``reads``, all else writes or scales ``writes``."""
    write, scale = Axis("write", writes), Axis("scale", writes)
    axes: dict[str, tuple[Axis | None, ...]] = {
        "A": (None, Axis("read", reads)),
        "B": (write, None),
        "magnitude": (scale,),
        "row_norm": (scale,),
    }
    return {name: LabelledTensor(value, axes.get(name, (write,))) for name, value in values.items()}


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


def head_tensors(values: Mapping[str, Tensor], reads: str) -> dict[str, LabelledTensor]:
    """Label a head's tensors: its first layer reads ``reads``."""
    read = Axis("read", reads)
    first = "dense" if "dense.weight" in values else "out"
    return {
        name: LabelledTensor(value, (None,) if value.ndim == 1 else (None, read if name == f"{first}.weight" else None))
        for name, value in values.items()
    }


def average(modules: Sequence[Module]) -> Module:
    """True mean of the modules of one window, tensor by tensor (AVG, arXiv 2403.18804).

    LoRA updates with different scaling are first expressed with the scaling of the first one.

    Raises:
        PlanError: the modules differ in inner width, so their tensors cannot be added.
    """
    first = modules[0]
    if len(modules) == 1:
        return first
    widths = [module.width for module in modules]
    if len(set(widths)) > 1:
        raise PlanError(
            "modules of different rank or bottleneck cannot be averaged",
            where=str(first.site),
            found=", ".join(f"{module.site}: {width}" for module, width in zip(modules, widths, strict=True)),
            fix="choose layers with --layers skip or an explicit list",
        )
    aligned = [
        module.rescaled(first.scaling) if isinstance(module, LoraModule) and isinstance(first, LoraModule) else module
        for module in modules
    ]
    mean = {
        name: torch.stack([module.tensors[name].values.double() for module in aligned]).mean(0).to(tensor.values.dtype)
        for name, tensor in first.tensors.items()
    }
    return first.with_values(mean)


def rank_stabilised_scaling(alpha: float, rank: int, *, rslora: bool) -> float:
    """LoRA's scaling: alpha / r, or alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)
