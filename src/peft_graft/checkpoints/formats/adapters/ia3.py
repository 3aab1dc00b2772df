"""AdapterHub's IA3, which the library keeps as a LoRA that scales: what a layer writes is multiplied by alpha * B."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from peft_graft.checkpoints.formats.adapters.codec import Codec, Saved, Settings, in_container, register_codec
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.modules.base import Part
from peft_graft.modules.ia3 import ScalePart


@register_codec
class Ia3Codec(Codec):
    """IA3."""

    kind: ClassVar = "ia3"

    def claims(self, settings: Settings) -> bool:
        """Whether the settings are of a LoRA that scales."""
        return settings.get("architecture") == "lora" and settings.get("composition_mode") == "scale"

    def parts(self, saved: Saved) -> tuple[dict[str, Part], Settings]:
        """The factors with alpha in them."""
        found = in_container(saved, "loras", self.kind, {"lora_B": "output"})
        alpha = saved.setting("alpha")
        return {path: ScalePart(values["output"].flatten() * alpha) for path, values in found.items()}, saved.settings

    def tensors(self, raw: RawCheckpoint, settings: Settings, names: StudentNames) -> dict[str, Tensor]:
        """The factors without alpha."""
        return {
            f"{path}.loras.{raw.name}.lora_B": part.tensors["output"][:, None] / settings["alpha"]
            for path, part in raw.parts.items()
        }
