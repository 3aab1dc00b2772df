"""The matrices of a model's vocabulary: word embeddings, and the output layer that a bare model lacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from peft_graft.errors import ModelError
from peft_graft.models.checks import explained, file_of
from peft_graft.models.devices import BaseTensors, is_blank, is_quantised
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
        found = _stored(place, shapes, options)
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


def _stored(place: str, names: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those tensors of a model's safetensors that have these very names; none where it has no such files."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    files: dict[str, str] = dict.fromkeys(names, SAFE_WEIGHTS_NAME)
    if index := file_of(place, SAFE_WEIGHTS_INDEX_NAME, source, "model"):
        files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    found = {}
    for name in names:
        file = file_of(place, files[name], source, "model") if name in files else None
        if file:
            with safe_open(file, "pt") as stored:
                if name in stored.keys():  # noqa: SIM118 - it is no mapping
                    found[name] = stored.get_tensor(name)
    return found
