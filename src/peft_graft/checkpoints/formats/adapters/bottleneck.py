"""AdapterHub's bottleneck adapters, compacters written out, and the invertible part of language adapters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from peft_graft.checkpoints.formats.adapters import compacter
from peft_graft.checkpoints.formats.adapters.codec import Codec, Saved, Settings, in_container, register_codec
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.modules.base import Part
from peft_graft.modules.bottleneck import BottleneckPart, Placement
from peft_graft.modules.invertible import InvertiblePart

_NEEDED = {"down.weight", "down.bias", "up.weight", "up.bias"}
#: Where the library keeps the part that works on the embeddings.
_INVERTIBLE = "invertible_adapters"


@register_codec
class BottleneckCodec(Codec):
    """Bottleneck adapters of all arrangements."""

    kind: ClassVar = "bottleneck"
    unsupported: ClassVar = {}  # a gate is a part that is moved

    def claims(self, settings: Settings) -> bool:
        """Whether the settings name no architecture."""
        return settings.get("architecture") is None

    def parts(self, saved: Saved) -> tuple[dict[str, Part], Settings]:
        """The adapters by the path of their container, and the invertible part by its own."""
        tensors, settings = saved.tensors, saved.settings
        if settings.get("phm_layer"):
            tensors, settings = compacter.written_out(tensors, settings, saved.adapter, saved.where)
        own: dict[str, Tensor] = {}
        inverted: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if inner := re.fullmatch(rf"((?:.+\.)?{_INVERTIBLE})\.{re.escape(saved.adapter)}\.(.+)", key):
                inverted.setdefault(inner[1], {})[inner[2]] = tensor
            else:
                own[key] = tensor
        parts: dict[str, Part] = {}
        if own or not inverted:
            known = {theirs: ours for ours, keys in _names(settings).items() for theirs in keys}
            found = in_container(replace(saved, tensors=own), "adapters", self.kind, known, _NEEDED)
            placement = _placement(settings)
            parts = {f"{path}.adapters": BottleneckPart(values, placement) for path, values in found.items()}
        return parts | {path: InvertiblePart(values) for path, values in inverted.items()}, settings

    def tensors(self, raw: RawCheckpoint, settings: Settings, names: StudentNames) -> dict[str, Tensor]:
        """The adapters' tensors; a norm before the adapter has two names."""
        keys = _names(settings)
        return {
            f"{path}.{raw.name}.{key}": tensor
            for path, part in raw.parts.items()
            for name, tensor in part.tensors.items()
            for key in (keys[name] if isinstance(part, BottleneckPart) else [name])
        }

    def settings(self, raw: RawCheckpoint, settings: Settings, names: StudentNames) -> dict[str, Any]:
        """Reduction factors by layer, the commonest as the module's own."""
        written = dict(settings)
        adapters = {path: part for path, part in raw.parts.items() if isinstance(part, BottleneckPart)}
        if len(adapters) == len(raw.parts) and written.get("inv_adapter"):
            written.update(inv_adapter=None, inv_adapter_reduction_factor=None)
        if not adapters:
            return written
        shapes = {names.position(path): part.tensors["down.weight"].shape for path, part in adapters.items()}
        factors = {layer: reduction_factor(hidden, width) for layer, (width, hidden) in shapes.items()}
        default = Counter(factors.values()).most_common(1)[0][0]
        others = {str(layer): factor for layer, factor in factors.items() if factor != default}
        written["reduction_factor"] = {**others, "default": default} if others else default
        return written

    def layer(self, path: str, names: StudentNames) -> int | None:
        """The adapter's layer; the invertible part is in none."""
        return None if path.rpartition(".")[2] == _INVERTIBLE else names.position(path)


def reduction_factor(hidden_size: int, width: int) -> float | int:
    """The factor from which the library computes this bottleneck width, int(hidden_size // factor) == width."""
    factor = hidden_size / width
    if int(hidden_size // factor) != width:
        factor = hidden_size / (width + 0.5)
    return int(factor) if float(factor).is_integer() else factor


def _names(settings: Settings) -> Mapping[str, list[str]]:
    """Our name of a tensor -> its names in the file."""
    # With ln_before the norm is also the first member of the sequence adapter_down; the linear layer comes second.
    first = bool(settings.get("ln_before"))
    both = ("weight", "bias")
    names = {f"down.{part}": [f"adapter_down.{int(first)}.{part}"] for part in both}
    names |= {f"up.{part}": [f"adapter_up.{part}"] for part in both}
    names |= {f"norm_{side}.{part}": [f"adapter_norm_{side}.{part}"] for side in ("before", "after") for part in both}
    if first:
        for part in both:
            names[f"norm_before.{part}"].append(f"adapter_down.0.{part}")
    return names | {name: [name] for name in ("gate.weight", "gate.bias", "scaling")}


def _placement(settings: Settings) -> Placement:
    if settings.get("is_parallel"):
        return "parallel"
    return "after_norm" if settings.get("original_ln_before") else "before_norm"
