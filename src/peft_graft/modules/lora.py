"""LoRA and DoRA: low-rank updates of linear layers, of word embeddings and of output layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from peft_graft.errors import CheckpointError, PlanError
from peft_graft.models.spaces import EMBEDDED, TOKENS_OUT, VOCABULARY, Site, Space
from peft_graft.models.spec import EMBED_ROLE, VOCABULARY_ROLES
from peft_graft.modules.base import Axis, Base, LabelledTensor, Module, Part, like, register_module
from peft_graft.modules.embeddings import is_vocabulary, vocabulary_scale


@dataclass(frozen=True, eq=False)
class LoraPart(Part):
    """Factors of a linear layer's update, scaling * B A.

    ``A`` [r, d_in], ``B`` [d_out, r]; optionally ``bias`` [d_out] of B, DoRA's ``magnitude`` [d_out], and the trained
    ``base_bias`` [d_out] of the layer itself. ``scaling`` is alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
    """

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    base_bias: Tensor | None = None

    reading_matrix: ClassVar[str | None] = "A"
    SHAPES: ClassVar = {
        "A": ("r", "d_in"),
        "B": ("d_out", "r"),
        **dict.fromkeys(("bias", "magnitude", "base_bias"), ("d_out",)),
    }

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.A)

    @property
    def is_active(self) -> bool:
        """Whether B is anything but zero."""
        return bool(self.B.any())

    @property
    def replaces_bias(self) -> bool:
        """Whether the layer's own bias was trained."""
        return self.base_bias is not None

    def trains_tokens(self, path: str) -> bool:
        """Whether the layer is an output layer."""
        return is_vocabulary(path)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The layer's weight [d_out, d_in] and bias [d_out] with the update inside; the wider dtype of both."""
        own = weight.double()
        whole = own + (self.scaling * self.B.double() @ self.A.double()).to(own)
        if self.magnitude is not None:
            whole = whole * (self.magnitude.to(own) / whole.norm(dim=1))[:, None]
        bias = bias if self.base_bias is None else self.base_bias
        if self.bias is not None:
            added = self.scaling * self.bias.double()
            bias = added.to(self.bias) if bias is None else (bias.double() + added.to(bias.device)).to(bias)
        return whole.to(torch.promote_types(weight.dtype, self.A.dtype)), bias


@dataclass(frozen=True, eq=False)
class EmbeddingLoraPart(LoraPart):
    """Factors of word embeddings: ``A`` [r, V] and ``B`` [d, r]."""

    reading_matrix: ClassVar[str | None] = None
    SHAPES: ClassVar = {"A": ("r", "V"), "B": ("d", "r")}

    def trains_tokens(self, path: str) -> bool:
        """Always."""
        return True


@register_module(LoraPart, EmbeddingLoraPart)
@dataclass(frozen=True)
class LoraModule(Module):
    """Low-rank update of a linear layer, y += scaling * B A x (Hu et al. 2021, arXiv 2106.09685).

    Tensors: ``A`` [r, d_in] reads, ``B`` [d_out, r] writes, optionally ``bias`` [d_out] of B, which writes and is
    scaled like it. DoRA (Liu et al. 2024, arXiv 2402.09353) has ``magnitude`` [d_out], which scales the output, beside
    ``row_norm`` [d_out], the norms of the rows of W + scaling * B A that it stands for. A trained bias of the linear
    layer itself is ``base_bias`` [d_out], beside ``base_bias_was``. ``scaling`` is alpha / r, or alpha / sqrt(r) for
    rank-stabilised LoRA.
    """

    ZERO_IF_NEUTRAL: ClassVar = ("B", "bias")
    RELATIVE_TO: ClassVar = {"magnitude": "row_norm", "base_bias": "base_bias_was"}
    scaling: float = 1.0

    def untrained(self, seed: int) -> Self:
        """B = 0, and A as peft draws it: uniform within 1 / sqrt(d_in)."""
        found = self.neutral()
        reading = found.values["A"]
        generator = torch.Generator().manual_seed(seed)
        drawn = (2 * torch.rand(reading.shape, generator=generator) - 1) / reading.shape[1] ** 0.5
        return found.with_values({**found.values, "A": drawn.to(reading.dtype)})

    @property
    def width(self) -> int:
        """The rank r."""
        return self.tensors["A"].values.shape[0]

    @property
    def is_plain(self) -> bool:
        """Whether A and B are all there is."""
        return self.tensors.keys() == {"A", "B"}

    @property
    def is_active(self) -> bool:
        """Whether the update, or a value beside it, is anything but zero."""
        product = all(bool(self.tensors[name].values.any()) for name in ("A", "B"))
        added = "bias" in self.tensors and bool(self.tensors["bias"].values.any())
        return (self.scaling != 0 and (product or added)) or self.differs_from_base

    @property
    def strength(self) -> float:
        """Frobenius norm of the update scaling * B A."""
        return float(self.delta().norm())

    @property
    def has_units_of_heads(self) -> bool:
        """Whether there is nothing in it but the update: magnitudes and biases belong to all heads."""
        return self.tensors.keys() <= {"A", "B", "bias"}

    def delta(self) -> Tensor:
        """The update as one matrix, scaling * B A, [d_out, d_in], float64."""
        return self.scaling * (self.tensors["B"].values.double() @ self.tensors["A"].values.double())

    def rescaled(self, scaling: float) -> Self:
        """The same update expressed with another scaling factor; B and its bias take the ratio."""
        if scaling == self.scaling:
            return self
        ratio = self.scaling / scaling
        values = {
            name: (value.double() * ratio).to(value.dtype) if name in ("B", "bias") else value
            for name, value in self.values.items()
        }
        return replace(self, scaling=scaling).with_values(values)

    def in_terms_of(self, other: Module) -> Module:
        """The same update with the other's scaling."""
        return self.rescaled(other.scaling) if isinstance(other, LoraModule) else self

    def _carried_over(self, name: str, value: Tensor, was: Tensor, now: Tensor) -> Tensor:
        """DoRA's magnitudes as they were in proportion to the rows' norms."""
        return value * (now / was) if name == "magnitude" else super()._carried_over(name, value, was, now)

    @classmethod
    def at_site(cls, part: Part, path: str, site: Site, base: Base) -> Self:
        """The update of a linear layer, of its part in a fused layer, or of a vocabulary."""
        assert isinstance(part, LoraPart)
        if site.role in VOCABULARY_ROLES:
            return cls._of_vocabulary(part, path, site, base)
        linear = base.linear(site, path)
        values = {
            name: value if name == "A" else base.rows_of(value, site, path, name)
            for name, value in part.tensors.items()
        }
        values |= _base_values(values, site, base, part.scaling)
        return cls(site, lora_tensors(values, linear.reads, linear.writes), scaling=part.scaling)

    @classmethod
    def _of_vocabulary(cls, part: LoraPart, path: str, site: Site, base: Base) -> Self:
        if others := part.tensors.keys() - {"A", "B"}:
            raise CheckpointError(
                f"a LoRA of a vocabulary with {', '.join(sorted(others))} cannot be moved yet",
                where=path,
                fix="train it without DoRA and biases there",
            )
        size = part.A.shape[1] if site.role == EMBED_ROLE else part.B.shape[0]
        known = base.architecture.size(Space(-1, VOCABULARY))
        if size != known:
            raise CheckpointError(
                "a LoRA of a vocabulary that was resized cannot be moved: what it adds to is not in the base model",
                where=path,
                expected=f"{known} tokens",
                found=size,
                fix="save the resized model and give it with --teacher, or train the added tokens with "
                "modules_to_save or trainable_token_indices",
            )
        reads, writes = (VOCABULARY, EMBEDDED) if site.role == EMBED_ROLE else (TOKENS_OUT, VOCABULARY)
        scaling = part.scaling * vocabulary_scale(site, base.architecture)
        return cls(site, lora_tensors(part.tensors, reads, writes), scaling=scaling)

    def to_part(self, base: Base) -> LoraPart:
        """The factors as a file has them, of a layer of its own."""
        if self.site.role in VOCABULARY_ROLES:
            part = EmbeddingLoraPart if self.site.role == EMBED_ROLE else LoraPart
            return part(**self.values, scaling=self.scaling / vocabulary_scale(self.site, base.architecture))
        own = self.rebased(_base_values(self.values, self.site, base, self.scaling)).values
        return LoraPart(**{name: own[name] for name in own.keys() - self.RELATIVE_TO.values()}, scaling=self.scaling)

    @classmethod
    def joined(cls, path: str, modules: Sequence[Self], base: Base) -> LoraPart:
        """One LoRA of all projections."""
        parts = {module.site.role: module.to_part(base) for module in modules}
        return _joined(parts, base, _unchanged(next(iter(parts.values())), modules[0].site, base))


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


def rank_stabilised_scaling(alpha: float, rank: int, *, rslora: bool) -> float:
    """LoRA's scaling: alpha / r, or alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _base_values(values: Mapping[str, Tensor], site: Site, base: Base, scaling: float) -> dict[str, Tensor]:
    """What the base model has where a LoRA's values are relative to it: ``row_norm`` and ``base_bias_was``."""
    found: dict[str, Tensor] = {}
    architecture = base.architecture
    units = architecture.units[site.role] if base.is_fused(site) else None
    if "magnitude" in values:
        weight = base.tensor(site, "weight")
        if weight is None or weight.is_meta:
            found["row_norm"] = torch.ones_like(values["magnitude"])
        else:
            weight = weight.T if architecture.transposed else weight
            weight = weight if units is None else weight[units.to(weight.device)]
            whole = weight.double().cpu() + scaling * values["B"].double().cpu() @ values["A"].double().cpu()
            found["row_norm"] = whole.norm(dim=1).to(values["magnitude"])
    if "base_bias" in values:
        bias = base.tensor(site, "bias")
        if bias is None:
            raise PlanError(
                "the module trains a bias that this model's layer does not have",
                where=f"{architecture.model_type} {site}",
                fix="train the module with bias='none'",
            )
        found["base_bias_was"] = like(bias if units is None else bias[units.to(bias.device)], values["base_bias"])
    return found


def _unchanged(part: LoraPart, site: Site, base: Base) -> dict[str, Tensor]:
    """What a part of a whole fused layer holds in place of what the layer has, where that stays as it is."""
    found: dict[str, Tensor] = {}
    weight, bias = base.tensor(site, "weight"), base.tensor(site, "bias")
    if part.magnitude is not None and weight is not None and not weight.is_meta:
        rows = weight.T if base.architecture.transposed else weight
        found["magnitude"] = rows.double().norm(dim=1).to(part.magnitude).cpu()
    if part.base_bias is not None and bias is not None and not bias.is_meta:
        found["base_bias"] = bias.detach().to(part.base_bias).clone()
    return found


def _joined(parts: Mapping[str, LoraPart], base: Base, unchanged: Mapping[str, Tensor]) -> LoraPart:
    """One LoRA for a fused linear layer from those of its projections, by role.

    Projections that read through one A share it; otherwise the ranks add up: [A_q; A_v] and B in blocks.

    Args:
        unchanged: what replaces values of the layer, [units], as it stays in projections that no module acts on.
    """
    first = next(iter(parts.values()))
    dtype, size = first.B.dtype, base.architecture.fused_size(next(iter(parts)))
    shared: list[Tensor] = []
    for part in parts.values():
        if not any(torch.equal(part.A, other) for other in shared):
            shared.append(part.A)
    starts = [sum(len(a) for a in shared[:index]) for index in range(len(shared))]
    whole = {"B": torch.zeros(size, sum(map(len, shared)), dtype=dtype)}
    whole |= {name: torch.zeros(size, dtype=dtype) for name in first.tensors.keys() - {"A", "B"}}
    whole |= unchanged
    for role, part in parts.items():
        units, ratio = base.architecture.units[role], part.scaling / first.scaling
        start = starts[next(index for index, other in enumerate(shared) if torch.equal(part.A, other))]
        for name, value in part.tensors.items():
            if name not in whole:
                continue
            scaled = value if ratio == 1 or name not in ("B", "bias") else value.double() * ratio
            place = (units, slice(start, start + part.rank)) if name == "B" else (units,)
            whole[name][place] = scaled.to(dtype).cpu()
    return LoraPart(A=torch.cat(shared), **whole, scaling=first.scaling)
