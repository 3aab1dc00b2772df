"""Moving labelled tensors from the teacher's spaces to the student's: one loop over named axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from peft_graft.alignment.maps import Selection, SpaceMap
from peft_graft.modules.base import Axis, LabelledTensor, Module
from peft_graft.modules.head import Head

#: The map of a named space.
Lookup = Callable[[Axis], SpaceMap]
Part = TypeVar("Part", Module, Head)


def project(part: Part, lookup: Lookup) -> Part:
    """A module or head with every named axis moved by its space's map; other axes, and the dtype, stay.

    Args:
        part: tensors labelled with the teacher's spaces.
        lookup: axis label -> map; a method that shares maps between spaces does so here.
    """
    values = {name: _project_tensor(tensor, lookup) for name, tensor in part.tensors.items()}
    for name, tensor in part.tensors.items():
        # x_t ~ R x_s + offset: what the offset gives goes into the bias of the layer that reads.
        bias, read = f"{name.removesuffix('.weight')}.bias", tensor.axes[-1]
        if read is None or read.direction != "read" or tensor.values.ndim < 2 or bias not in values:
            continue
        offset = lookup(read).offset
        if offset is not None:
            constant = tensor.values.double() @ offset.to(tensor.values.device, torch.float64)
            values[bias] = (values[bias].double() + constant).to(values[bias].dtype)
    moved = part.with_values(values)
    assert isinstance(moved, type(part))
    return moved


def _project_tensor(tensor: LabelledTensor, lookup: Lookup) -> Tensor:
    values = tensor.values
    for axis, label in enumerate(tensor.axes):
        if label is not None:
            values = lookup(label).apply(values, axis, label.direction)
    return values


def resize_inner_layer(head: Head, size: int) -> tuple[Head, int]:
    """A head whose inner layer has ``size`` units, as task classes of the student demand (inner size = hidden size).

    More units: the new ones read and give nothing, so the head computes the same. Fewer: the units that contribute
    least to the logits, by the product of their weight norms, are dropped.

    Returns:
        The head and the number of units dropped.
    """
    if not head.has_inner_layer or head.tensors["dense.weight"].values.shape[0] == size:
        return head, 0
    dense, out = head.tensors["dense.weight"].values, head.tensors["out.weight"].values
    present = dense.shape[0]
    if size > present:
        kept = torch.cat([torch.arange(present), torch.full((size - present,), -1)])
    else:
        weight = dense.float().norm(dim=1) * out.float().norm(dim=0)
        kept = weight.topk(size).indices.sort().values
    select = Selection(kept, present)
    values = {name: tensor.values for name, tensor in head.tensors.items()}
    values["dense.weight"] = select.apply(values["dense.weight"], 0, "write")
    if "dense.bias" in values:
        values["dense.bias"] = select.apply(values["dense.bias"], 0, "write")
    values["out.weight"] = select.apply(values["out.weight"], 1, "read")
    return head.with_values(values), max(0, present - size)
