"""AdapterHub's LoRA: two factors a layer, one rank and one alpha for all layers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from peft_graft.checkpoints.formats.adapters.codec import (
    Codec,
    Saved,
    Settings,
    in_container,
    on_fused_layer,
    register_codec,
)
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError
from peft_graft.modules.base import Part
from peft_graft.modules.lora import LoraPart


@register_codec
class LoraCodec(Codec):
    """LoRA; one that scales is an IA3."""

    kind: ClassVar = "lora"

    def claims(self, settings: Settings) -> bool:
        """Whether the settings are of a LoRA that adds."""
        return settings.get("architecture") == "lora" and settings.get("composition_mode") != "scale"

    def parts(self, saved: Saved) -> tuple[dict[str, Part], Settings]:
        """The factors of every layer.

        Raises:
            CheckpointError: they are of several projections of a fused layer, or of another rank than the settings say.
        """
        found = in_container(saved, "loras", self.kind, {"lora_A": "A", "lora_B": "B"})
        for path, values in found.items():
            ranks = [len(values["A"]), values["B"].shape[-1]] if values["A"].ndim == values["B"].ndim == 2 else [1, 1]
            if ranks[1] and ranks[0] > ranks[1] and ranks[0] % ranks[1] == 0:  # the factors of several projections
                raise on_fused_layer(path)
            if ranks[0] != saved.setting("r"):  # which the scale depends on
                raise CheckpointError(
                    f"the factors of {path} have another rank than the settings say",
                    where=saved.where,
                    expected=saved.setting("r"),
                    found=ranks[0],
                    fix="correct r and alpha in adapter_config.json",
                )
        scaling = saved.setting("alpha") / saved.setting("r")
        return {path: LoraPart(**values, scaling=scaling) for path, values in found.items()}, saved.settings

    def tensors(self, raw: RawCheckpoint, settings: Settings, names: StudentNames) -> dict[str, Tensor]:
        """The factors."""
        return {
            f"{path}.loras.{raw.name}.lora_{name}": tensor
            for path, part in raw.parts.items()
            for name, tensor in part.tensors.items()
        }

    def settings(self, raw: RawCheckpoint, settings: Settings, names: StudentNames) -> dict[str, Any]:
        """Rank and alpha.

        Raises:
            CheckpointError: they differ by layer.
        """
        loras = [part for part in raw.parts.values() if isinstance(part, LoraPart)]
        ranks, scalings = {part.rank for part in loras}, {part.scaling for part in loras}
        if len(ranks) > 1 or len(scalings) > 1:
            raise CheckpointError(
                "AdapterHub's LoRA has one rank and one alpha for all layers",
                where=raw.name,
                found=f"ranks {sorted(ranks)}, scalings {sorted(scalings)}",
            )
        rank, scaling = ranks.pop(), scalings.pop()
        alpha = scaling * rank
        return {**settings, "r": rank, "alpha": int(alpha) if float(alpha).is_integer() else alpha}
