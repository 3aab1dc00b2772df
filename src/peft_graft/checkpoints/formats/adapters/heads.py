"""AdapterHub's prediction heads, which are alike in all models: dropout, linear, activation, dropout, linear.

A checkpoint has them by their places in that sequence, ``layers.1.weight`` and so on, whatever the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peft_graft.checkpoints.formats.adapters.versions import VERSION
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.errors import HeadError, PlanError
from peft_graft.labels import ProblemType
from peft_graft.models.spaces import FIRST_OUT, POOLED_OUT, TOKENS_OUT
from peft_graft.models.tasks import Task
from peft_graft.modules.head import Head, head_tensors

_START = "layers."
_KEY = re.compile(r"layers\.\d{1,4}\.(weight|bias)")
_MULTI_LABEL = "multilabel_classification"
_ANSWERS = "question_answering"
_TASKS = {
    "tagging": Task.TOKEN_CLASSIFICATION,
    _ANSWERS: Task.QUESTION_ANSWERING,
    "classification": Task.SEQUENCE_CLASSIFICATION,
    _MULTI_LABEL: Task.SEQUENCE_CLASSIFICATION,
}
_TYPES = {
    Task.TOKEN_CLASSIFICATION: "tagging",
    Task.QUESTION_ANSWERING: _ANSWERS,
    Task.SEQUENCE_CLASSIFICATION: "classification",
}
#: What the library's heads read.
_READ = (TOKENS_OUT, FIRST_OUT, POOLED_OUT)


def is_prediction_head(tensors: Mapping[str, Tensor]) -> bool:
    """Whether saved tensors are of a prediction head, and not of a head of a task model."""
    return any(key.startswith(_START) for key in tensors)


def problem_type_of(head_config: Mapping[str, Any] | None) -> ProblemType | None:
    """What the head's outputs are, as far as its type says."""
    settings = (head_config or {}).get("config")
    kind = settings.get("head_type") if isinstance(settings, Mapping) else None
    return ProblemType.MULTI_LABEL if kind == _MULTI_LABEL else None


def read_head(raw: RawCheckpoint) -> Head:
    """The prediction head of a checkpoint, without label names.

    Raises:
        HeadError: it is of a type that is not supported.
    """
    settings = dict((raw.head_config or {}).get("config") or {})
    kind = settings.get("head_type")
    if odd := [key for key in raw.head if not _KEY.fullmatch(key)]:
        raise HeadError(
            f"tensor {odd[0]} belongs to no known layer of a prediction head",
            where=raw.name,
            fix="leave the head behind with --head drop",
        )
    numbers = _numbers(raw.head)
    if kind not in _TASKS or len(numbers) > 2:
        raise HeadError(
            f"prediction heads of type {kind!r} with {len(numbers)} layers are not supported yet",
            where=raw.name,
            expected=f"{', '.join(_TASKS)}, of one or two layers",
            fix="leave the head behind with --head drop",
        )
    names = {place: name for name, place in _places(raw.head).items()}
    values = {
        f"{names[place]}.{part}": tensor for key, tensor in raw.head.items() for place, _, part in [key.rpartition(".")]
    }
    whole = _TASKS[kind] is Task.SEQUENCE_CLASSIFICATION
    reads = TOKENS_OUT if not whole else POOLED_OUT if settings.get("use_pooler") else FIRST_OUT
    # The first versions wrote no activation, and had this one.
    activation = settings.get("activation_function", "tanh") if len(numbers) == 2 else None
    return Head(_TASKS[kind], head_tensors(values, reads), reads, (), activation)


def as_before(head: Head, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head's tensors at the places of those that were saved."""
    return _at(head, _places(saved))


def build_head(head: Head, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration of a head of this form, and its tensors by their places.

    Raises:
        PlanError: the library has no head that reads this.
    """
    if head.reads not in _READ:
        raise PlanError(
            "AdapterHub has no head that reads this",
            where="--library adapters",
            found=head.reads,
            fix="leave the head behind with --head drop",
        )
    places = {"out": f"{_START}4", "dense": f"{_START}1"} if head.has_inner_layer else {"out": f"{_START}1"}
    labels = head.labels or tuple(f"LABEL_{index}" for index in range(head.num_labels))
    settings = {
        "head_type": _MULTI_LABEL if head.problem_type is ProblemType.MULTI_LABEL else _TYPES[head.task],
        "num_labels": head.num_labels,
        "layers": len(places),
        "activation_function": head.activation or "tanh",
        "label2id": {label: index for index, label in enumerate(labels)},
        "dropout_prob": None,
    }
    if head.reads != TOKENS_OUT:
        settings |= {"bias": True, "use_pooler": head.reads == POOLED_OUT}
    return {"config": settings, "name": name, "version": VERSION}, _at(head, places)


def _numbers(tensors: Mapping[str, Tensor]) -> list[int]:
    return sorted({int(key.split(".")[1]) for key in tensors})


def _places(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """``out``, and ``dense`` before it where there are two layers -> its place."""
    numbers = _numbers(tensors)
    return dict(zip(("dense", "out")[-len(numbers) :], (f"{_START}{number}" for number in numbers), strict=True))


def _at(head: Head, places: Mapping[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in head.tensors.items():
        layer, _, part = name.partition(".")
        found[f"{places[layer]}.{part}"] = tensor.values
    return found
