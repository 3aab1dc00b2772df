"""Maps between two activation spaces, applied to one axis of a weight at a time.

With activations x_s [d_s] of the student and x_t [d_t] of the teacher in paired spaces, a map supplies

    reading   R [d_t, d_s],  x_t ~ R x_s + offset,   A_s = A_t R
    writing   W [d_s, d_t],  y_s ~ W y_t,            B_s = W B_t
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_graft.errors import AlignmentError
from peft_graft.modules.base import Direction


class SpaceMap(ABC):
    """What every map can do."""

    @property
    @abstractmethod
    def teacher_size(self) -> int:
        """Number of teacher units, d_t."""

    @property
    @abstractmethod
    def student_size(self) -> int:
        """Number of student units, d_s."""

    @abstractmethod
    def apply(self, values: Tensor, axis: int, direction: Direction) -> Tensor:
        """Move one axis of a weight from the teacher's space to the student's; the dtype stays.

        Raises:
            AlignmentError: the axis is not of the teacher space's size.
        """

    @property
    def offset(self) -> Tensor | None:
        """[d_t]: what a reading map leaves to the bias of the layer that reads, None for nothing."""
        return None

    def _check(self, values: Tensor, axis: int) -> None:
        if values.shape[axis] != self.teacher_size:
            raise AlignmentError(
                "the map does not fit this axis", expected=f"size {self.teacher_size}", found=values.shape[axis]
            )


@dataclass(frozen=True)
class Selection(SpaceMap):
    """One teacher unit for each student unit: R = Z^T and W = Z with a binary Z [d_s, d_t].

    ``indices`` [d_s], int64: the teacher unit that stands in for student unit i, or -1 where there is none (a
    student wider than its teacher); such a unit reads and writes zero. Selecting copies values bit for bit, and both
    directions pick the same units.
    """

    indices: Tensor
    size: int

    @staticmethod
    def identity(size: int) -> Selection:
        """Every unit stands for itself."""
        return Selection(torch.arange(size), size)

    @property
    def teacher_size(self) -> int:
        """Number of teacher units, d_t."""
        return self.size

    @property
    def student_size(self) -> int:
        """Number of student units, d_s."""
        return len(self.indices)

    def apply(self, values: Tensor, axis: int, direction: Direction) -> Tensor:
        """Pick the units; unmatched ones are zero, or one where they scale."""
        self._check(values, axis)
        picked = values.index_select(axis, self.indices.clamp_min(0).to(values.device))
        missing = (self.indices < 0).nonzero().flatten().to(values.device)
        return picked.index_fill(axis, missing, int(direction == "scale")) if len(missing) else picked


@dataclass(frozen=True)
class LinearMap(SpaceMap):
    """A pair of matrices, each fitted for its own direction, and the offset that goes with reading.

    Attributes:
        reading [d_t, d_s], writing [d_s, d_t], shift [d_t]: x_t ~ reading x_s + shift; y_s ~ writing y_t for what a
        module adds, which has no constant part. One of the two may be missing where no module needs it.
    """

    reading: Tensor | None
    writing: Tensor | None
    shift: Tensor

    def __post_init__(self) -> None:
        if self.reading is None and self.writing is None:
            raise ValueError("a map of neither direction")

    @property
    def teacher_size(self) -> int:
        """Number of teacher units, d_t."""
        return len(self.shift)

    @property
    def student_size(self) -> int:
        """Number of student units, d_s."""
        if self.reading is not None:
            return self.reading.shape[1]
        return len(self._matrix("write"))

    def _matrix(self, direction: str) -> Tensor:
        """The matrix of a direction.

        Raises:
            AlignmentError: the alignment was made without it.
        """
        found = self.reading if direction == "read" else self.writing
        if found is None:
            raise AlignmentError(
                f"the alignment has no map for what {'reads' if direction == 'read' else 'writes'} here",
                expected="an alignment made for these modules",
                fix="run `peft-graft align` again with their --sites, or with all",
            )
        return found

    @property
    def offset(self) -> Tensor | None:
        """The shift of the reading map."""
        return self.shift

    def apply(self, values: Tensor, axis: int, direction: Direction) -> Tensor:
        """Multiply the axis by the matrix of its direction, in float64.

        What scales the teacher's units one by one scales a unit of the student by their mean, weighted by how much
        variance of it each of them writes: the rows of the squared writing matrix, each with sum one.

        Raises:
            AlignmentError: the axis does not fit, or it scales incoming units one by one, which no mixture can do.
        """
        self._check(values, axis)
        if values.ndim == 1 and direction == "read":
            raise AlignmentError(
                "weights that scale single units cannot move through a map that mixes units",
                found="a vector on an incoming axis, such as an adapter's own layer norm",
                fix="use --method prune-align",
            )
        if direction == "scale":
            squares = self._matrix("write").to(values.device, torch.float64).square()
            matrix = squares / squares.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        else:
            found = self._matrix(direction)
            matrix = (found.T if direction == "read" else found).to(values.device, torch.float64)
        moved = torch.movedim(torch.tensordot(matrix, values.double(), dims=([1], [axis])), 0, axis)
        return moved.to(values.dtype).contiguous()
