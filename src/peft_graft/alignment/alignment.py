"""Alignments: the maps between the spaces of two models, found once and used for every module of that pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from peft_graft.alignment.maps import Selection, SpaceMap
from peft_graft.alignment.methods import Diagnostics, Method, Solver
from peft_graft.alignment.moments import PairedStatistics
from peft_graft.errors import AlignmentError
from peft_graft.models.spaces import Space

Pair = tuple[Space, Space]  # teacher space, student space


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
    return Alignment("copy", teacher, student, {pair: Selection.identity(sizes[0]) for pair, sizes in pairs.items()})


def solve_alignment(
    method: Method,
    statistics: Mapping[Pair, tuple[PairedStatistics, PairedStatistics]],
    teacher: str,
    student: str,
    details: Mapping[str, Any],
) -> Alignment:
    """Solve every pair of spaces with a method that uses text.

    Args:
        statistics: for each pair of spaces those to fit and those of held-out text.
    """
    if method.solve is None:
        raise ValueError(f"{method.name} needs no statistics")
    # Pairs of spaces that are the same tensors share their statistics, and so the solution.
    distinct = {id(moments[0]): moments for moments in statistics.values()}
    solutions = dict(zip(distinct, _solved(method.solve, list(distinct.values())), strict=True))
    solved = {pair: solutions[id(moments[0])] for pair, moments in statistics.items()}
    return Alignment(
        method.name,
        teacher,
        student,
        {pair: space_map for pair, (space_map, _) in solved.items()},
        {pair: diagnostics for pair, (_, diagnostics) in solved.items()},
        details,
    )


def _solved(
    solve: Solver, statistics: Sequence[tuple[PairedStatistics, PairedStatistics]]
) -> list[tuple[SpaceMap, Diagnostics]]:
    """Every problem solved; on a CPU as many at a time as torch has threads, each in one, for they are small."""
    threads = torch.get_num_threads()
    if threads == 1 or any(fit.cross.device.type != "cpu" for fit, _ in statistics):
        return [solve(*moments) for moments in statistics]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(lambda moments: solve(*moments), statistics))
    finally:
        torch.set_num_threads(threads)
