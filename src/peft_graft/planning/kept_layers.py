"""Which layers of the teacher a student consists of, told by their weights: pruned, halved and distilled models.

Layers of unrelated models have a cosine of 0, and so have two layers of one model; a layer that was kept and trained on
has one near 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from safetensors import SafetensorError
from torch import Tensor

from peft_graft.config import AUTO
from peft_graft.errors import ModelError
from peft_graft.models.loading import ModelHandle, ModelPair
from peft_graft.models.spec import Stack
from peft_graft.models.stored import StoredTensors
from peft_graft.planning.correspondence import corresponding_stacks
from peft_graft.planning.layers import layer_map, layer_maps

#: Cosine from which on a layer is taken to be the other one.
SAME_LAYER = 0.5
#: Matrices of a layer that are compared, and values of each.
_MATRICES, _VALUES = 2, 4096


def with_kept_layers(layers: str, models: ModelPair) -> tuple[str, list[str]]:
    """The layer map, where it is left to the weights the one that they tell, and remarks on it.

    Args:
        layers: as in ``PairConfig``. models: loaded, or described: of these the weights on this machine are looked at,
            as far as they are in safetensors under the names that the model has for them.
    """
    if layers != AUTO:
        return layers, []
    teacher, student = models.teacher, models.student
    stacks = corresponding_stacks(teacher.architecture, student.architecture)
    usual = layer_maps(AUTO, stacks)
    specs, notes = dict(usual), []
    for first, second in stacks:
        kept = kept_layers((teacher, first), (student, second))
        depths = teacher.architecture.depths[first.name], student.architecture.depths[second.name]
        if kept is None or tuple((layer,) for layer in kept) == layer_map(AUTO, *depths):
            continue
        specs[second.name] = ",".join(map(str, kept))
        of_stack = f"{second.name} " if second.name else ""
        notes.append(f"the student's {of_stack}layers have the weights of the teacher's layers {specs[second.name]}")
    if specs == usual:
        return layers, []
    named = ";".join(f"{name}={spec}" for name, spec in specs.items())
    return (named if any(specs) else specs[""]), notes


def kept_layers(teacher: tuple[ModelHandle, Stack], student: tuple[ModelHandle, Stack]) -> list[int] | None:
    """For each layer of the student's stack the teacher's that it was; None where one of them was none of these."""
    sides = [_Layers.of(*side) for side in (teacher, student)]
    matrices = list(islice(_common(*sides), _MATRICES))
    if not matrices:
        return None
    first, second = (
        torch.nn.functional.normalize(torch.cat(parts, dim=1), dim=1) for parts in zip(*matrices, strict=True)
    )
    best, layers = (second @ first.T).max(dim=1)
    return layers.tolist() if bool((best >= SAME_LAYER).all()) else None


@dataclass(frozen=True)
class _Layers:
    """The weights of a model, and how the names of those in each layer begin.

    ``values``: on the meta device where the model is described only; then ``stored`` has them.
    """

    values: Mapping[str, Tensor]
    starts: Sequence[str]
    stored: StoredTensors | None
    prefix: str

    @classmethod
    def of(cls, model: ModelHandle, stack: Stack) -> _Layers:
        depth = model.architecture.depths[stack.name]
        starts = [f"{stack.layers}.{layer}." for layer in range(depth)]
        stored = None
        if model.is_blank:
            stored = StoredTensors(model.place, {**model.loading.source(model.name), "local_files_only": True})
        return cls(model.base_tensors(), starts, stored, f"{model.base.base_model_prefix}.")

    def has(self, path: str) -> bool:
        """Whether every layer has it; layers may differ, as those of T5 and of some mixtures of experts."""
        return all(f"{start}{path}" in self.values for start in self.starts)

    def sampled(self, path: str, shape: torch.Size) -> Tensor | None:
        """The first values in every layer, [layers, n] float32; None where they are of another shape, or not there."""
        found, rows = [], -(-_VALUES // max(1, shape[1]))
        for start in self.starts:
            if self.values[name := f"{start}{path}"].shape != shape:
                return None
            value = self._rows(name, rows)
            if value is None or value.shape != (min(rows, shape[0]), shape[1]):
                return None
            found.append(value.flatten()[:_VALUES].float().cpu())
        return torch.stack(found)

    def _rows(self, name: str, count: int) -> Tensor | None:
        if self.stored is None:
            return self.values[name][:count]
        try:  # task models store what they have inside under its own prefix
            found = self.stored.rows(name, count)
            return self.stored.rows(self.prefix + name, count) if found is None else found
        except (
            ModelError,
            OSError,
            SafetensorError,
            ValueError,
            KeyError,
        ):  # what is amiss with files is said when the model is loaded
            return None


def _common(teacher: _Layers, student: _Layers) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples of the matrices that all layers of both models have in the same shape."""
    first = student.starts[0]
    for path in [name.removeprefix(first) for name in student.values if name.startswith(first)]:
        if teacher.has(path) and student.has(path) and len(shape := student.values[f"{first}{path}"].shape) == 2:
            # Most paths of unlike models end at the teacher's first layer, before the student's weights are read.
            if (of_teacher := teacher.sampled(path, shape)) is None:
                continue
            if (of_student := student.sampled(path, shape)) is not None:
                yield of_teacher, of_student
