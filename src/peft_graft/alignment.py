"""Maps between activation spaces, and the methods that find them from paired statistics.

With activations x_s [d_s] of the student and x_t [d_t] of the teacher in paired spaces, a map supplies

    reading   R [d_t, d_s],  x_t ~ R x_s,   A_s = A_t R
    writing   W [d_s, d_t],  y_s ~ W y_t,   B_s = W B_t

A method is a pure function ``PairedStatistics -> (SpaceMap, diagnostics)`` in the dict ``METHODS``; it never sees
text or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from peft_graft.errors import AlignmentError
from peft_graft.modules import Direction, Space
from peft_graft.statistics import Moment, PairedStatistics

Pair = tuple[Space, Space]  # teacher space, student space
Diagnostics = dict[str, float]


@dataclass(frozen=True)
class SpaceMap:
    """A selection of teacher units, one for each student unit: R = Z^T and W = Z with a binary Z [d_s, d_t].

    ``indices`` [d_s], int64: the teacher unit that stands in for student unit i, or -1 where there is none (a
    student wider than its teacher); such a unit reads and writes zero. Selecting copies values bit for bit.
    """

    indices: Tensor
    teacher_size: int

    @staticmethod
    def identity(size: int) -> SpaceMap:
        """Every unit stands for itself."""
        return SpaceMap(torch.arange(size), size)

    @property
    def student_size(self) -> int:
        """Number of student units."""
        return len(self.indices)

    @property
    def is_identity(self) -> bool:
        """Whether every unit stands for itself."""
        return self.teacher_size == self.student_size and bool((self.indices == torch.arange(self.student_size)).all())

    def apply(self, values: Tensor, axis: int, direction: Direction) -> Tensor:
        """Move one axis of a weight from the teacher's space to the student's.

        For a selection both directions pick the same units; a map by regression would treat them apart.

        Raises:
            AlignmentError: the axis is not of the teacher space's size.
        """
        del direction
        if values.shape[axis] != self.teacher_size:
            raise AlignmentError(
                "the map does not fit this axis", expected=f"size {self.teacher_size}", found=values.shape[axis]
            )
        picked = values.index_select(axis, self.indices.clamp_min(0).to(values.device))
        missing = (self.indices < 0).nonzero().flatten().to(values.device)
        return picked.index_fill(axis, missing, 0) if len(missing) else picked


@dataclass(frozen=True)
class Method:
    """One way of aligning two spaces.

    Attributes:
        name: as the user types it.
        solve: statistics to a map and its diagnostics; None for a method that needs no text.
        moments: what ``solve`` needs beside the cross moment.
        writes_through_input: LoRA's output rows are mapped with the map of its input space (published shortcut).
        summary: one line for help and reports.
    """

    name: str
    summary: str
    solve: Callable[[PairedStatistics], tuple[SpaceMap, Diagnostics]] | None = None
    moments: tuple[Moment, ...] = ("cross",)
    writes_through_input: bool = False

    @property
    def needs_text(self) -> bool:
        """Whether the method aligns on text."""
        return self.solve is not None


def assign_by_correlation(statistics: PairedStatistics) -> tuple[SpaceMap, Diagnostics]:
    """Correlate and assign (arXiv 2403.18804): maximise the summed Pearson correlation of one-to-one matches.

    Units that do not vary have correlation 0 with everything, so they are matched last. With d_s > d_t the
    d_s - d_t least correlated student units stay unmatched; with d_s < d_t teacher units are pruned.
    """
    correlation = statistics.correlation().cpu().numpy()
    rows, columns = linear_sum_assignment(correlation, maximize=True)
    indices = np.full(correlation.shape[0], -1, dtype=np.int64)
    indices[rows] = columns
    matched = correlation[rows, columns]
    teacher_constant, student_constant = statistics.constant_units()
    return SpaceMap(torch.from_numpy(indices), correlation.shape[1]), {
        "pairs": statistics.count,
        "mean_correlation": float(matched.mean()),
        "min_correlation": float(matched.min()),
        "unmatched_student_units": int((indices < 0).sum()),
        "constant_teacher_units": int(teacher_constant.sum()),
        "constant_student_units": int(student_constant.sum()),
    }


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("copy", "weights unchanged; for a student that shares the teacher's spaces"),
        Method(
            "prune-align",
            "correlate, assign, prune and reorder; every axis in its own space",
            solve=assign_by_correlation,
        ),
        Method(
            "prune-align-published",
            "the same, with LoRA's output rows pruned by its input's indices, as in the paper's code",
            solve=assign_by_correlation,
            writes_through_input=True,
        ),
    )
}


@dataclass(frozen=True)
class Alignment:
    """Maps for the pairs of spaces of two models, found once and used for every module of that pair.

    ``teacher`` and ``student`` are fingerprints of the models (``models.fingerprint``); ``details`` records how the
    alignment was made (text, tokens, versions) and ends up in its JSON file.
    """

    method: str
    teacher: str
    student: str
    maps: Mapping[Pair, SpaceMap]
    diagnostics: Mapping[Pair, Diagnostics] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def map(self, pair: Pair) -> SpaceMap:
        """The map of one pair of spaces.

        Raises:
            AlignmentError: the alignment was made without this pair.
        """
        if pair not in self.maps:
            raise AlignmentError(
                "the alignment lacks this pair of spaces",
                where=f"teacher {pair[0]} -> student {pair[1]}",
                fix="run `peft-graft align` again with the same --layers (and all --sites), or leave --alignment out",
            )
        return self.maps[pair]


def copy_alignment(pairs: Mapping[Pair, tuple[int, int]], teacher: str, student: str) -> Alignment:
    """The alignment of ``copy``: identity maps for ``pairs``, given with their (teacher, student) sizes.

    Raises:
        AlignmentError: a pair of spaces differs in size.
    """
    for (teacher_space, student_space), (teacher_size, student_size) in pairs.items():
        if teacher_size != student_size:
            raise AlignmentError(
                "spaces of different size cannot be copied",
                where=f"teacher {teacher_space} -> student {student_space}",
                expected=f"{teacher_size} units in the student",
                found=student_size,
                fix="use --method prune-align with --text",
            )
    return Alignment("copy", teacher, student, {pair: SpaceMap.identity(sizes[0]) for pair, sizes in pairs.items()})


def solve_alignment(
    method: Method, statistics: Mapping[Pair, PairedStatistics], teacher: str, student: str, details: Mapping[str, Any]
) -> Alignment:
    """Solve every pair of spaces with a method that uses text."""
    if method.solve is None:
        raise ValueError(f"{method.name} needs no statistics")
    solved = {pair: method.solve(moments) for pair, moments in statistics.items()}
    return Alignment(
        method.name,
        teacher,
        student,
        {pair: space_map for pair, (space_map, _) in solved.items()},
        {pair: diagnostics for pair, (_, diagnostics) in solved.items()},
        details,
    )
