"""Classification heads that are trained and saved beside a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peft_graft.errors import HeadError
from peft_graft.labels import ProblemType
from peft_graft.models.tasks import Task
from peft_graft.modules.base import Axis, LabelledTensor, misfit

#: Activation functions between a head's layers.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
}


#: Axes of a head's tensors, without and with an inner layer.
_OUT = {"out.weight": ("labels", "d"), "out.bias": ("labels",)}
_INNER = {"dense.weight": ("h", "d"), "dense.bias": ("h",), "out.weight": ("labels", "h"), "out.bias": ("labels",)}


@dataclass(frozen=True)
class Head:
    """A classification head: an optional inner layer and an output layer.

    ``out.weight`` [labels, d], ``out.bias`` [labels] and optionally ``dense.weight`` [h, d], ``dense.bias`` [h],
    followed by ``activation``; then ``out.weight`` is [labels, h]. ``reads`` names the space it reads: the last hidden
    state of every token, of the first token, or the pooler's output. ``problem_type`` is None where nothing says
    otherwise than that one of the classes holds.
    """

    task: Task
    tensors: Mapping[str, LabelledTensor]
    reads: str
    labels: tuple[str, ...]
    activation: str | None = None
    problem_type: ProblemType | None = None

    @property
    def can_be_fitted(self) -> bool:
        """Whether it can be fitted to predictions: the activation of its inner layer, if it has one, is a known one."""
        return not self.has_inner_layer or self.activation in ACTIVATIONS

    @property
    def has_classes(self) -> bool:
        """Whether its outputs are of classes or numbers, which have names, and not the ends of answers."""
        return self.task is not Task.QUESTION_ANSWERING

    @property
    def has_inner_layer(self) -> bool:
        """Whether a dense layer stands before the output layer."""
        return "dense.weight" in self.tensors

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return self.tensors["out.weight"].values.shape[0]

    def with_values(self, values: Mapping[str, Tensor]) -> Head:
        """The same head with other values, axes kept."""
        tensors = {name: LabelledTensor(values[name], tensor.axes) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)


def head_tensors(values: Mapping[str, Tensor], reads: str) -> dict[str, LabelledTensor]:
    """Label a head's tensors: its first layer reads ``reads``.

    Raises:
        HeadError: they do not fit each other, or the output layer's weight is missing.
    """
    read = Axis("read", reads)
    first = "dense" if "dense.weight" in values else "out"
    wrong = misfit(values, _INNER if first == "dense" else _OUT)
    if wrong or "out.weight" not in values:
        name, expected, found = wrong or ("out.weight", "[labels, d]", "none")
        raise HeadError(
            f"{name} of the head has another shape than the rest of it",
            expected=expected,
            found=found,
            fix="leave the head behind with --head drop",
        )
    return {
        name: LabelledTensor(value, (None,) if value.ndim == 1 else (None, read if name == f"{first}.weight" else None))
        for name, value in values.items()
    }
