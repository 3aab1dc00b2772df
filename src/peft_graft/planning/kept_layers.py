"""Which layers of the teacher a student consists of, told by their weights: pruned, halved and distilled models.

Layers of unrelated models have a cosine of 0, and so have two layers of one model; a layer that was kept and trained on
has one near 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from peft_graft.models.loading import ModelHandle, ModelPair
from peft_graft.models.spec import Stack
from peft_graft.planning.correspondence import corresponding_stacks
from peft_graft.planning.layers import BY_WEIGHTS, layer_map, layer_maps

#: Cosine from which on a layer is taken to be the other one.
SAME_LAYER = 0.5
#: Matrices of a layer that are compared, and values of each.
_MATRICES, _VALUES = 2, 4096


def with_kept_layers(layers: str, models: ModelPair) -> tuple[str, list[str]]:
    """The layer map, where it is left to the weights the one that they tell, and remarks on it.

    Args:
        layers: as in ``PairConfig``. models: loaded.
    """
    if layers != BY_WEIGHTS:
        return layers, []
    teacher, student = models.teacher, models.student
    stacks = corresponding_stacks(teacher.architecture, student.architecture)
    usual = layer_maps(BY_WEIGHTS, stacks)
    specs, notes = dict(usual), []
    for first, second in stacks:
        kept = kept_layers((teacher, first), (student, second))
        depths = teacher.architecture.depths[first.name], student.architecture.depths[second.name]
        if kept is None or tuple((layer,) for layer in kept) == layer_map(BY_WEIGHTS, *depths):
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
    weights = [handle.base_tensors() for handle, _ in (teacher, student)]
    depths = [handle.architecture.depths[stack.name] for handle, stack in (teacher, student)]
    paths = _compared(weights, [f"{stack.layers}.0." for _, stack in (teacher, student)])
    if not paths:
        return None
    first, second = (
        torch.stack(list(_values(values, stack, depth, paths)))
        for values, (_, stack), depth in zip(weights, (teacher, student), depths, strict=True)
    )
    cosines = torch.nn.functional.normalize(second, dim=1) @ torch.nn.functional.normalize(first, dim=1).T
    best, layers = cosines.max(dim=1)
    return layers.tolist() if bool((best >= SAME_LAYER).all()) else None


def _compared(weights: Sequence[Mapping[str, Tensor]], starts: Sequence[str]) -> list[str]:
    """Paths inside a layer of matrices that both models have in the same shape."""
    shapes: list[dict[str, torch.Size]] = [
        {name.removeprefix(start): values[name].shape for name in values if name.startswith(start)}
        for values, start in zip(weights, starts, strict=True)
    ]
    common = [path for path, shape in shapes[0].items() if len(shape) == 2 and shapes[1].get(path) == shape]
    return common[:_MATRICES]


def _values(values: Mapping[str, Tensor], stack: Stack, depth: int, paths: Sequence[str]) -> Iterator[Tensor]:
    """Some of the values of every layer, [n] float32."""
    for layer in range(depth):
        found = [values[f"{stack.layers}.{layer}.{path}"].flatten() for path in paths]
        yield torch.cat([one[:: max(1, len(one) // _VALUES)][:_VALUES].float().cpu() for one in found])
