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

#: Names of norms, and of what has norms of its own outside the base model.
_NAME = re.compile(r"(?i).*norm\d*|ln_\w+|sa_layer_norm")
_HEADS = {"classifier", "score", "head", "lm_head", "cls", "qa_outputs", "predictions", "vocab_layer_norm"}
#: What a norm's vectors are called where it was trained whole beside a module.
SAVED = {"norm.weight": "weight", "norm.bias": "bias"}
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


def saved_place(path: str) -> tuple[str, str] | None:
    """Module path and name (``SAVED``) of a vector of a norm that was trained whole, as modules_to_save does."""
    owner, _, last = re.sub(r"\.modules_to_save\.[^.]+", "", path).rpartition(".")
    names = owner.split(".")
    name = f"norm.{last}"
    return (owner, name) if name in SAVED and _NAME.fullmatch(names[-1]) and _HEADS.isdisjoint(names) else None


def saved_part(path: str, values: Mapping[str, Tensor], where: str) -> NormPart | None:
    """The norm that was saved at a path, None where there is none.

    Raises:
        CheckpointError: there is something else beside it.
    """
    if SAVED.keys().isdisjoint(values):
        return None
    if values.keys() - SAVED.keys():
        raise CheckpointError(
            f"the file holds a trained norm at {path} and something else there, of which peft loads one alone",
            where=where,
            found=", ".join(sorted(values)),
            fix="load the file with peft and save_pretrained, which writes what it has loaded",
        )
    return NormPart(**{SAVED[name]: value for name, value in values.items()})
