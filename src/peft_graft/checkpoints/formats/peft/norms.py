"""PEFT's LN tuning: layer norms that are saved whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from peft_graft.checkpoints.formats.peft.codec import Codec, Found, register_codec
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError
from peft_graft.modules.base import Part
from peft_graft.modules.norms import NormPart

_KEY = re.compile(r"(.+)\.ln_tuning_layers\.(?:[^.]+\.)?(weight|bias)")


@register_codec
class NormCodec(Codec):
    """LN tuning."""

    kind: ClassVar = "norms"
    peft_types: ClassVar = ("LN_TUNING",)

    def place(self, path: str) -> tuple[str, str] | None:
        """The norm's path, and which of its two vectors it is."""
        match = _KEY.fullmatch(path)
        return (match[1], match[2]) if match else None

    def parts(self, found: Found, config: Mapping[str, Any], where: str) -> dict[str, Part]:
        """The norms."""
        if not found:
            raise CheckpointError("the file holds no tensors of its kind", where=where, expected="LN_TUNING")
        return {path: NormPart(**values) for path, values in found.items()}

    def tensors(self, parts: Mapping[str, Part]) -> dict[str, Tensor]:
        """The norms' vectors."""
        return {
            f"{self.prefix}{path}.ln_tuning_layers.{name}": tensor
            for path, part in parts.items()
            for name, tensor in part.tensors.items()
        }

    def config(self, raw: RawCheckpoint, config: dict[str, Any], names: StudentNames) -> dict[str, Any]:
        """The norms by name, none excluded."""
        return super().config(raw, {**config, "exclude_modules": None}, names)
