"""The matrices of a model's vocabulary: word embeddings, and the output layer that a bare model lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft_graft.errors import ModelError
from peft_graft.models.checks import explained
from peft_graft.models.devices import BaseTensors, is_blank, is_quantised
from peft_graft.models.stored import StoredTensors
from peft_graft.models.task_models import auto_class, blank_model, is_remote
from peft_graft.models.tasks import Task

_COMPARED = 4096  # rows of word embeddings, about


def word_embeddings(model: nn.Module) -> Tensor:
    """[V, d], wherever accelerate keeps them."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    if not weight.is_meta:
        return weight.detach()
    name = next(name for name, value in model.named_parameters() if value is weight)
    return BaseTensors(model, frozenset(), {})[name]


def embedding_similarity(teacher: nn.Module, student: nn.Module) -> float | None:
    """Mean cosine between the two models' word embeddings, row by row; None where their shapes differ.

    Near 1 for a model and one made from it (distilled, pruned, tuned further), near 0 for unrelated ones.
    """
    first, second = (word_embeddings(model) for model in (teacher, student))
    if first.shape != second.shape:
        return None
    step = max(1, len(first) // _COMPARED)
    return float(
        nn.functional.cosine_similarity(first[::step].cpu().float(), second[::step].cpu().float(), dim=1).mean()
    )


def output_layer(base: Any, place: str, path: str, options: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Weight [V, d] and bias [V] of the output layer of a model that was loaded without it.

    The word embeddings where they are tied; else read from the checkpoint alone where it has them as they are, and
    with all of the model where it does not.

    Args:
        base: the bare model of transformers. place: its folder or hub id. path: the layer's, in a language model.
        options: of ``from_pretrained``.

    Raises:
        ModelError: there is no language model of this name to take it from, or it has no output layer.
    """
    blank = blank_model(base.config, Task.CAUSAL_LM, trust_remote_code=is_remote(base))
    own = blank.get_output_embeddings()
    if own.weight is blank.get_input_embeddings().weight:
        return word_embeddings(base).detach(), None
    if is_blank(base):
        return own.weight.detach(), None
    shapes = {f"{path}.{name}": value.shape for name, value in own.named_parameters()}
    if not is_quantised(base):
        stored = StoredTensors(place, options)
        found = {name: value for name in shapes if (value := stored.get(name)) is not None}
        if {name: value.shape for name, value in found.items()} == shapes:
            values = {name: value.to(base.dtype) for name, value in found.items()}
            return values[f"{path}.weight"], values.get(f"{path}.bias")
    with explained(place, "output layer"):
        whole, info = auto_class(Task.CAUSAL_LM, base.config).from_pretrained(
            place, output_loading_info=True, **{**options, "dtype": base.dtype}
        )
    if f"{path}.weight" in info["missing_keys"]:
        raise ModelError("the model's checkpoint has no output layer", where=place)
    layer = whole.get_output_embeddings()
    return layer.weight.detach(), None if getattr(layer, "bias", None) is None else layer.bias.detach()
