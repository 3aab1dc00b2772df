"""Models that read more than text: which of their parts reads text, by its names before and after transformers 4.52.

A module of such a model is known by its text tower, which is a language model like any other. What it changes in other
towers belongs to images or sound.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

#: Names of text towers in the models that hold them.
_TEXT = ("language_model", "text_model")
#: Names of what reads images or sound, and of what brings that to the text tower.
_OTHERS = frozenset(
    (
        "vision", "vision_tower", "vision_model", "vision_encoder", "vision_backbone", "vision_embed_tokens",
        "vision_proj", "visual", "visual_tokenizer", "image_tower", "image_encoder", "video_tower", "vpm",
        "img_processor", "embed_vision", "audio_tower", "audio_model", "audio_encoder", "speech_encoder",
        "audio_projection", "embed_audio", "multi_modal_projector", "mm_projector", "modality_projection",
        "language_projection", "connector", "aligner", "qformer", "resampler",
    )
)  # fmt: skip
#: A text tower in a path, which is a language model in itself before 4.52: ``language_model.model.layers``.
_INSIDE = re.compile(rf"(?P<before>(?:.*\.)?)(?:{'|'.join(_TEXT)})\.(?P<whole>(?:model\.)?)(?P<local>.+)")


def text_tower(base: nn.Module) -> str:
    """The name of the part that reads text in a model that reads more, empty where there is none."""
    config = getattr(getattr(base, "config", None), "text_config", None)
    for name in _TEXT:
        own = getattr(getattr(base, name, None), "config", None)
        if config is not None and own is not None and own.model_type == config.model_type:
            return name
    return ""


def other_towers(base: nn.Module, tower: str) -> frozenset[str]:
    """The names of all parts of a model beside its text tower."""
    return frozenset(name for name, _ in base.named_children() if name != tower)


def tower_of(path: str, beside: Collection[str] = ()) -> str | None:
    """The tower that a path leads into, None for one that leads into no other tower than that of text.

    Args:
        beside: names of a model's own towers, beside those that are known.
    """
    return next((name for name in path.split(".") if name in _OTHERS or name in beside), None)


def without_tower(path: str) -> tuple[str, str] | None:
    """A path in a text tower as the text model alone has it, and what stands before the text model in a task model.

    None for a path that names no text tower.

    Example:
        >>> without_tower("model.language_model.layers.0.mlp.up_proj")
        ('layers.0.mlp.up_proj', 'model.')
        >>> without_tower("language_model.model.layers.0.mlp.up_proj")
        ('layers.0.mlp.up_proj', 'model.')
    """
    match = _INSIDE.fullmatch(path)
    return (match["local"], match["before"] or match["whole"]) if match else None
