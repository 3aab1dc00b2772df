"""PEFT's virtual tokens: prompt tuning, p-tuning and prefix tuning, all saved as one tensor ``prompt_embeddings``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from peft_graft.checkpoints.formats.peft.codec import Codec, Found, register_codec
from peft_graft.checkpoints.formats.peft.options import PROMPTS
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError
from peft_graft.modules.base import Part
from peft_graft.modules.prompts import PROMPT, PromptPart, prefix_pairs, prefix_parts

KEY = "prompt_embeddings"


class _VirtualTokens(Codec):
    """What both have in common: one tensor, beside a model without a tuner around it."""

    prefix: ClassVar = "base_model."

    def place(self, path: str) -> tuple[str, str] | None:
        """The one tensor, which is at no path."""
        return ("", KEY) if path == KEY else None

    def _checked(self, found: Found, expected: list[int], where: str) -> Tensor:
        tensor = found.get("", {}).get(KEY)
        if tensor is None or list(tensor.shape) != expected:
            raise CheckpointError(
                f"{KEY} is missing or has another shape than the configuration says",
                where=where,
                expected=expected,
                found=None if tensor is None else list(tensor.shape),
            )
        return tensor

    def config(self, raw: RawCheckpoint, config: dict[str, Any], names: StudentNames) -> dict[str, Any]:
        """The student's configuration.

        What was saved is what the text is preceded by, not the network that made it (p-tuning's encoder, a prefix's
        projection): so p-tuning becomes prompt tuning, which computes the same, and a prefix is one without projection.
        """
        written = {name: value for name, value in config.items() if not name.startswith("encoder_")}
        layers = names.num_layers // int(config.get("num_transformer_submodules") or 1)
        return {**written, "num_layers": layers, **self._shape(raw, names)}

    @abstractmethod
    def _shape(self, raw: RawCheckpoint, names: StudentNames) -> dict[str, Any]:
        """What the configuration says about the vectors."""


@register_codec
class PromptCodec(_VirtualTokens):
    """Prompt tuning and p-tuning."""

    kind: ClassVar = "prompt"
    peft_types: ClassVar = ("PROMPT_TUNING", "P_TUNING")
    options: ClassVar = PROMPTS

    def parts(self, found: Found, config: Mapping[str, Any], where: str) -> dict[str, Part]:
        """The vectors before the text [n, d]."""
        # Of an encoder-decoder peft keeps twice as many, though only the first half ever stands before a text.
        number = int(config.get("num_virtual_tokens") or 0) * int(config.get("num_transformer_submodules") or 1)
        return {PROMPT: PromptPart(self._checked(found, [number, int(config.get("token_dim") or 0)], where))}

    def tensors(self, parts: Mapping[str, Part]) -> dict[str, Tensor]:
        """The vectors as the file has them."""
        return {KEY: parts[PROMPT].tensors["embeddings"]}

    def _shape(self, raw: RawCheckpoint, names: StudentNames) -> dict[str, Any]:
        return {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "token_dim": raw.parts[PROMPT].tensors["embeddings"].shape[1],
            "num_attention_heads": names.num_heads,
        }


@register_codec
class PrefixCodec(_VirtualTokens):
    """Prefix tuning."""

    kind: ClassVar = "prefix"
    peft_types: ClassVar = ("PREFIX_TUNING",)
    options: ClassVar = PROMPTS

    def parts(self, found: Found, config: Mapping[str, Any], where: str) -> dict[str, Part]:
        """Every layer's keys and values."""
        if int(config.get("num_transformer_submodules") or 1) != 1:
            raise CheckpointError("prefixes of encoder-decoders cannot be moved yet", where=where, fix="move a LoRA")
        number, layers, width = (
            int(config.get(name) or 0) for name in ("num_virtual_tokens", "num_layers", "token_dim")
        )
        tensor = self._checked(found, [number, 2 * layers * width], where)
        return prefix_parts(tensor.view(number, layers, 2, width), range(layers))

    def tensors(self, parts: Mapping[str, Part]) -> dict[str, Tensor]:
        """Keys and values as the file has them."""
        return {KEY: prefix_pairs(parts).flatten(1)}

    def _shape(self, raw: RawCheckpoint, names: StudentNames) -> dict[str, Any]:
        return {
            "prefix_projection": False,
            "token_dim": next(iter(raw.parts.values())).tensors["key"].shape[1],
            "num_attention_heads": names.num_kv_heads,
        }
