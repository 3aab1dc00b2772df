"""Virtual tokens: prompts before the text, and prefixes among what attention reads.

Prompt tuning (Lester et al. 2021, arXiv 2104.08691), p-tuning (Liu et al. 2021, arXiv 2103.10385), prefix tuning (Li
and Liang 2021, arXiv 2101.00190).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from peft_graft.errors import CheckpointError
from peft_graft.models.spaces import EMBEDDED, Site, Space
from peft_graft.models.spec import PREFIX_ROLE, PROMPT_ROLE
from peft_graft.modules.base import Axis, Base, LabelledTensor, Module, Part, register_module

#: Paths of parts: of a prompt, and of a prefix before the layer's number, counted through all layers.
PROMPT, PREFIX = "prompt", "prefix."


@dataclass(frozen=True, eq=False)
class PromptPart(Part):
    """Vectors before the text, ``embeddings`` [n, d]."""

    embeddings: Tensor

    SHAPES: ClassVar = {"embeddings": ("n", "d")}
    is_virtual: ClassVar = True

    @property
    def virtual_tokens(self) -> int:
        """n."""
        return len(self.embeddings)


@dataclass(frozen=True, eq=False)
class PrefixPart(Part):
    """Vectors among one layer's keys and values, ``key`` and ``value`` [n, d_kv]."""

    key: Tensor
    value: Tensor

    SHAPES: ClassVar = {"key": ("n", "d_kv"), "value": ("n", "d_kv")}
    is_virtual: ClassVar = True


@register_module(PromptPart, PrefixPart)
@dataclass(frozen=True)
class PromptModule(Module):
    """Virtual tokens before the text.

    Tensors: ``embeddings`` [n, d] write among the word embeddings, or ``key`` and ``value`` [n, d_kv] write among a
    layer's keys and values.
    """

    @property
    def width(self) -> int:
        """Number of virtual tokens."""
        return len(next(iter(self.tensors.values())).values)

    @property
    def is_active(self) -> bool:
        """True: one more token always changes something."""
        return True

    @property
    def strength(self) -> float:
        """Norm of the vectors."""
        return float(sum(float(value.double().norm()) for value in self.values.values()))

    def neutral(self) -> Self:
        """Vectors of zero, which is as near to no effect as a virtual token comes."""
        return self.with_values({name: torch.zeros_like(value) for name, value in self.values.items()})

    @classmethod
    def from_part(cls, part: Part, path: str, sites: Sequence[Site], base: Base) -> list[Self]:
        """The one module of the part; its site follows from its path, which is none of the model's."""
        site = Site(-1, PROMPT_ROLE) if path == PROMPT else Site(int(path.removeprefix(PREFIX)), PREFIX_ROLE)
        return [cls.at_site(part, path, site, base)]

    @classmethod
    def at_site(cls, part: Part, path: str, site: Site, base: Base) -> Self:
        """The vectors before the text, or of one layer."""
        architecture = base.architecture
        if isinstance(part, PromptPart) and Space(-1, EMBEDDED) in architecture.sizes:
            return cls(site, {"embeddings": LabelledTensor(part.embeddings, (None, Axis("write", EMBEDDED)))})
        if not isinstance(part, PrefixPart) or len(architecture.row.stacks) > 1:
            raise CheckpointError(
                f"a {'prefix' if isinstance(part, PrefixPart) else 'prompt'} of such a model cannot be moved",
                where=architecture.model_type,
                fix="move a LoRA",
            )
        expected = architecture.sizes.get(Space(site.layer, "attn.key.out"))
        if part.key.shape[1] != expected:
            raise CheckpointError(
                "the prefix has another size than this model's keys: it belongs to another model, or to one that keeps "
                "a copy of its keys for every query head",
                where=str(site),
                expected=expected,
                found=part.key.shape[1],
            )
        return cls(
            site,
            {
                name: LabelledTensor(value, (None, Axis("write", f"attn.{name}.out")))
                for name, value in part.tensors.items()
            },
        )

    def to_part(self, base: Base) -> Part:
        """The vectors as they are."""
        return PromptPart(**self.values) if "embeddings" in self.tensors else PrefixPart(**self.values)

    @classmethod
    def to_parts(cls, modules: Sequence[Self], base: Base) -> dict[str, Part]:
        """Each vector's part at the path that stands for its site."""
        return {
            PROMPT if module.site.layer < 0 else f"{PREFIX}{module.site.layer}": module.to_part(base)
            for module in modules
        }


def prefix_parts(pairs: Tensor, layers: Iterable[int]) -> dict[str, Part]:
    """The parts of these layers' keys and values, [n, layers, 2, d_kv]."""
    return {
        f"{PREFIX}{layer}": PrefixPart(pairs[:, index, 0].contiguous(), pairs[:, index, 1].contiguous())
        for index, layer in enumerate(layers)
    }


def prefix_pairs(parts: Mapping[str, Part]) -> Tensor:
    """The reverse of ``prefix_parts``, layers in their order."""
    ordered = [parts[path].tensors for path in sorted(parts, key=prefix_layer)]
    return torch.stack([torch.stack([values["key"], values["value"]], 1) for values in ordered], 1)


def prefix_layer(path: str) -> int:
    """The layer of a prefix's path."""
    return int(path.removeprefix(PREFIX))
