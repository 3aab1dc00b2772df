"""Classification heads that are trained and saved beside a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peft_graft.models.tasks import Task
from peft_graft.modules.base import Axis, LabelledTensor

#: Activation functions between a head's layers.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
}


@dataclass(frozen=True)
class Head:
    """A classification head: an optional inner layer and an output layer.

    ``out.weight`` [labels, d], ``out.bias`` [labels] and optionally ``dense.weight`` [h, d], ``dense.bias`` [h],
    followed by ``activation``; then ``out.weight`` is [labels, h]. ``reads`` names the space it reads: the last hidden
    state of every token, of the first token, or the pooler's output.
    """

    task: Task
    tensors: Mapping[str, LabelledTensor]
    reads: str
    labels: tuple[str, ...]
    activation: str | None = None

    @property
    def can_be_fitted(self) -> bool:
        """Whether it can be fitted to predictions: its activation function is a known one."""
        return not self.has_inner_layer or self.activation in ACTIVATIONS

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
    """Label a head's tensors: its first layer reads ``reads``."""
    read = Axis("read", reads)
    first = "dense" if "dense.weight" in values else "out"
    return {
        name: LabelledTensor(value, (None,) if value.ndim == 1 else (None, read if name == f"{first}.weight" else None))
        for name, value in values.items()
    }
