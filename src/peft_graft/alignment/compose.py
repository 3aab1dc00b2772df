"""Alignments put together: A -> B and B -> C give A -> C, without text and without the models."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_graft.alignment.maps import LinearMap, Selection, SpaceMap


def compose_maps(first: SpaceMap, second: SpaceMap) -> SpaceMap | None:
    """The map of A -> C from those of A -> B and B -> C, None where they share no direction.

        x_a ~ R1 x_b + s1 and x_b ~ R2 x_c + s2 give x_a ~ R1 R2 x_c + R1 s2 + s1;   W = W2 W1

    Selections give a selection, in whose indices a unit without a counterpart on the way has none.
    """
    if isinstance(first, Selection) and isinstance(second, Selection):
        through = first.indices[second.indices.clamp_min(0)]
        return Selection(torch.where(second.indices < 0, -1, through), first.size)
    before, after = _linear(first), _linear(second)
    reading, shift = None, before.shift.double()
    if before.reading is not None:
        shift = shift + before.reading.double() @ after.shift.double()
        reading = _product(before.reading, after.reading)
    writing = _product(after.writing, before.writing)
    return None if reading is None and writing is None else LinearMap(reading, writing, shift)


def _product(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return None if left is None or right is None else left.double() @ right.double()


def _linear(space_map: SpaceMap) -> LinearMap:
    """A selection as the matrices that it stands for."""
    if isinstance(space_map, LinearMap):
        return space_map
    assert isinstance(space_map, Selection)
    matched = torch.nn.functional.one_hot(space_map.indices + 1, space_map.size + 1)[:, 1:].double()
    return LinearMap(matched.T, matched, torch.zeros(space_map.size, dtype=torch.float64))
