"""Modules taken from models in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from peft_graft.checkpoints.formats.base import format_of
from peft_graft.checkpoints.formats.peft.format import config_dict
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import Library
from peft_graft.errors import CheckpointError
from peft_graft.labels import ProblemType
from peft_graft.models.task_models import own_labels, quiet_libraries, shared_copy


def is_peft_model(model: object) -> bool:
    """Whether this is a model of peft with modules inside."""
    import peft

    return isinstance(model, peft.PeftModel)


def read_live(model: Any) -> tuple[RawCheckpoint, nn.Module | str | None]:
    """The active module of a ``peft.PeftModel``, and the model that it sits in, without it; by its name, where biases
    were trained, which peft does in the model itself.

    The model is not touched: what is returned shares the values of its matrices.

    Raises:
        CheckpointError: a kind of module, or an option, that is not supported, or a module that is merged.
    """
    import peft

    if any(getattr(layer, "merged_adapters", None) for layer in model.modules()):
        raise CheckpointError(
            "the module is merged into the model, so the model without it cannot be had",
            where="the live PeftModel",
            fix="call unmerge_adapter() on it",
        )
    name = model.active_adapter
    config = config_dict(model.peft_config[name])
    inside = model.get_base_model()
    if config.get("task_type") is None:  # as ``save_pretrained`` writes it
        config["auto_mapping"] = {"base_model_class": type(inside).__name__, "parent_library": "transformers"}
    tensors = {
        key: value.detach().cpu() for key, value in peft.get_peft_model_state_dict(model, adapter_name=name).items()
    }
    raw = format_of(Library.PEFT).parse(config, tensors, where="the live model")
    raw = replace(
        raw,
        labels=own_labels(inside.config) or None,
        problem_type=ProblemType.declared(getattr(inside.config, "problem_type", None)),
    )
    if not any(part.replaces_bias for part in raw.parts.values()):
        return raw, _without_module(model)
    if raw.base_model:
        return raw, raw.base_model
    unknown = "what was trained of biases is not known, since nothing names the model without it: name the teacher"
    return replace(raw, notes=(*raw.notes, unknown)), _without_module(model)


def _without_module(model: Any) -> nn.Module:
    """The model of transformers inside a copy that shares its matrices, all modules taken out."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    copy = shared_copy(model)
    for path, part in list(copy.named_modules()):
        if isinstance(part, AuxiliaryTrainingWrapper):  # trained copies of the base model's own parts
            owner, _, leaf = path.rpartition(".")
            setattr(copy.get_submodule(owner), leaf, part.original_module)
    with quiet_libraries():
        inside = copy.unload() if hasattr(copy.base_model, "unload") else copy.get_base_model()
    assert isinstance(inside, nn.Module)
    return inside
