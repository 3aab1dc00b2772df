"""PEFT's IA3: one vector a layer, [1, d] for what the layer reads and [d, 1] for what it writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from peft_graft.checkpoints.formats.peft.codec import Codec, Found, register_codec
from peft_graft.checkpoints.formats.peft.options import SHARED
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError
from peft_graft.modules.base import Part
from peft_graft.modules.ia3 import ScalePart

_KEY = re.compile(r"(.+)\.(ia3_l)(?:\.[^.]+)?")


@register_codec
class Ia3Codec(Codec):
    """IA3."""

    kind: ClassVar = "ia3"
    peft_types: ClassVar = ("IA3",)
    options: ClassVar = {**SHARED, **dict.fromkeys(("feedforward_modules", "fan_in_fan_out", "init_ia3_weights"))}

    def place(self, path: str) -> tuple[str, str] | None:
        """The layer's path; older versions of peft wrote the adapter's name after the vector's."""
        match = _KEY.fullmatch(path)
        return (match[1], match[2]) if match else None

    def parts(self, found: Found, config: Mapping[str, Any], where: str) -> dict[str, Part]:
        """Factors by the shape that they are kept in."""
        if not found:
            raise CheckpointError("the file holds no tensors of its kind", where=where, expected="IA3")
        vectors = {path: values["ia3_l"] for path, values in found.items()}
        if odd := [path for path, value in vectors.items() if value.ndim < 2]:
            raise CheckpointError(
                f"the factors of {odd[0]} say neither that they scale what is read nor what is written",
                where=where,
                expected="[1, d] or [d, 1]",
                found=list(vectors[odd[0]].shape),
            )
        return {
            path: ScalePart(input=value.flatten()) if value.shape[0] == 1 else ScalePart(output=value.flatten())
            for path, value in vectors.items()
        }

    def tensors(self, parts: Mapping[str, Part]) -> dict[str, Tensor]:
        """The vectors in the shapes that tell them apart."""
        return {
            f"{self.prefix}{path}.ia3_l": tensor[None] if name == "input" else tensor[:, None]
            for path, part in parts.items()
            for name, tensor in part.tensors.items()
        }

    def config(self, raw: RawCheckpoint, config: dict[str, Any], names: StudentNames) -> dict[str, Any]:
        """Which of the layers scale what they read."""
        inputs = names.shortest_targets([path for path, part in raw.parts.items() if "input" in part.tensors])
        outputs = names.shortest_targets([path for path, part in raw.parts.items() if "input" not in part.tensors])
        own = {
            "exclude_modules": None,
            "feedforward_modules": inputs,
            "target_modules": sorted({*inputs, *outputs}),  # peft wants the former among these
            "fan_in_fan_out": bool(set(raw.parts) & names.transposed),
        }
        return {**super().config(raw, config, names), **own}
