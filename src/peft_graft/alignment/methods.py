"""The methods that find maps between spaces from statistics of paired activations.

A method is a pure function ``PairedStatistics -> (SpaceMap, diagnostics)`` in the dict ``METHODS``; it never sees text
or models. One that shrinks its estimate is also given statistics of held-out pairs to choose by.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from peft_graft.alignment.maps import LinearMap, Selection, SpaceMap
from peft_graft.alignment.moments import Moment, PairedStatistics
from peft_graft.models.spaces import VOCABULARY
from peft_graft.modules.base import Axis, Module
from peft_graft.options import METHOD_SUMMARIES

Diagnostics = dict[str, float]
#: (fit, held-out pairs) -> map and what to report about it.
Solver = Callable[[PairedStatistics, PairedStatistics], tuple[SpaceMap, Diagnostics]]

#: Ridge penalties to choose from, relative to the mean variance of the units that are read.
PENALTIES = tuple(10.0**power for power in (-10, -8, -6, -5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 1))

_TOLERANCE = 1.02  # of the least held-out error
_EXACT = 1e-6  # a relation that leaves less of the variance unexplained is one without noise


@dataclass(frozen=True)
class Method:
    """One way of aligning two spaces.

    Attributes:
        name: as the user types it.
        solve: statistics to a map and its diagnostics; None for a method that needs no text.
        moments: what ``solve`` needs beside the cross moment (``moments_for`` says for which direction).
        holds_out: whether ``solve`` chooses by held-out pairs.
        fits_shifts: the maps carry the head alone; the modules are fitted to move as the teacher's do (``functional``).
        writes_through_input: LoRA's output rows are mapped with the map of its input space (published shortcut).
    """

    name: str
    solve: Solver | None = None
    moments: tuple[Moment, ...] = ("cross",)
    holds_out: bool = False
    fits_shifts: bool = False
    writes_through_input: bool = False

    @property
    def summary(self) -> str:
        """One line for help and reports."""
        return METHOD_SUMMARIES[self.name]

    @property
    def needs_text(self) -> bool:
        """Whether the method aligns on text."""
        return self.solve is not None

    def moments_for(self, directions: Collection[str]) -> tuple[Moment, ...]:
        """What it needs beside the cross moment for maps of these directions alone.

        Reading regresses on the student's units and needs their moment, everything else on the teacher's.
        """
        sides = {"student" if direction == "read" else "teacher" for direction in directions}
        return tuple(moment for moment in self.moments if moment == "cross" or moment in sides)


def map_axis(method: Method, module: Module, axis: Axis) -> str:
    """The name of the space whose map moves this axis: its own, or the input's under the published shortcut."""
    if method.writes_through_input and axis.direction == "write" and "A" in module.tensors:
        read = module.tensors["A"].axes[1]
        assert read is not None
        return axis.space if VOCABULARY in (read.space, axis.space) else read.space
    return axis.space


def assign_by_correlation(
    statistics: PairedStatistics, held_out: PairedStatistics | None = None
) -> tuple[Selection, Diagnostics]:
    """Correlate and assign (arXiv 2403.18804): maximise the summed Pearson correlation of one-to-one matches.

    Units that do not vary have correlation 0 with everything, so they are matched last. With d_s > d_t the
    d_s - d_t least correlated student units stay unmatched; with d_s < d_t teacher units are pruned.
    """
    statistics = statistics.merge(held_out) if held_out else statistics
    correlation = statistics.correlation().cpu().numpy()
    rows, columns = linear_sum_assignment(correlation, maximize=True)
    indices = np.full(correlation.shape[0], -1, dtype=np.int64)
    indices[rows] = columns
    matched = correlation[rows, columns]
    teacher_constant, student_constant = statistics.constant_units()
    return Selection(torch.from_numpy(indices), correlation.shape[1]), {
        "pairs": statistics.count,
        "mean_correlation": float(matched.mean()),
        "min_correlation": float(matched.min()),
        "unmatched_student_units": int((indices < 0).sum()),
        "constant_teacher_units": int(teacher_constant.sum()),
        "constant_student_units": int(student_constant.sum()),
    }


def regress(statistics: PairedStatistics, held_out: PairedStatistics) -> tuple[LinearMap, Diagnostics]:
    """Ridge regression in both directions: R = C_ts (C_ss + lambda I)^-1 and W = C_st (C_tt + lambda I)^-1.

    For a LoRA, A_t R x_s is then the least-squares estimate of A_t x_t. Each penalty is the largest of ``PENALTIES``
    that leaves hardly more variance of the held-out pairs unexplained than the best; the maps are then solved from all
    pairs. A direction whose moment was not gathered has no map.
    ``read_explained`` and ``write_explained`` are the held-out shares of variance.
    """
    whole = statistics.merge(held_out)
    reading = writing = None
    diagnostics: Diagnostics = {"pairs": whole.count}
    if statistics.student_moment is not None and held_out.student_moment is not None:
        penalty, diagnostics["read_explained"] = choose_penalty(
            statistics.student_moment, statistics.cross.T, held_out.student_moment, held_out.cross.T,
            float(held_out.teacher_variance_sum.sum()),
        )  # fmt: skip
        diagnostics["read_penalty"] = penalty
        assert whole.student_moment is not None
        reading = ridge_solution(whole.student_moment, whole.cross.T, penalty)
    if statistics.teacher_moment is not None and held_out.teacher_moment is not None:
        penalty, diagnostics["write_explained"] = choose_penalty(
            statistics.teacher_moment, statistics.cross, held_out.teacher_moment, held_out.cross,
            float(held_out.student_variance_sum.sum()),
        )  # fmt: skip
        diagnostics["write_penalty"] = penalty
        assert whole.teacher_moment is not None
        writing = ridge_solution(whole.teacher_moment, whole.cross, penalty)
    shift = whole.teacher_mean if reading is None else whole.teacher_mean - reading @ whole.student_mean
    return LinearMap(reading, writing, shift), diagnostics


def rotate(statistics: PairedStatistics, held_out: PairedStatistics) -> tuple[LinearMap, Diagnostics]:
    """Orthogonal Procrustes (Schoenemann 1966): R = c U V^T and W = V U^T / c, with U S V^T = C_ts.

    c is the ratio of the spaces' spreads. No direction is amplified over another, so it is safe where ridge has little
    to go by. With sizes that differ R has orthonormal rows or columns. ``read_explained`` is the share of the
    teacher's variance over all pairs.
    """
    whole = statistics.merge(held_out)
    left, _, right = torch.linalg.svd(whole.cross.T, full_matrices=False)
    rotation = left @ right
    teacher, student = float(whole.teacher_variance_sum.sum()), float(whole.student_variance_sum.sum())
    scale = (teacher / student) ** 0.5 if teacher and student else 1.0
    reading = scale * rotation
    # |t - R s|^2 = |t|^2 - 2 <t, R s> + |R s|^2; the last is c^2 |s|^2 at most, and exactly where R does not shrink.
    fitted = 2 * float((reading * whole.cross.T).sum()) - scale**2 * student
    return LinearMap(reading, rotation.T / scale, whole.teacher_mean - reading @ whole.student_mean), {
        "pairs": whole.count,
        "read_explained": fitted / teacher if teacher else 0.0,
        "scale": scale,
    }


def choose_penalty(moment: Tensor, cross: Tensor, held_moment: Tensor, held_cross: Tensor,
                    held_total: float) -> tuple[float, float]:  # fmt: skip
    """The largest relative penalty with about the least held-out error, and the share of held-out variance it explains.

    Args: ``moment`` [d, d] of what is read, ``cross`` [k, d] with what is predicted; the same of the held-out pairs.

    In the eigenbasis V of the moment with eigenvalues e, the solution is P diag(1 / (e + lambda)) V^T with P = cross V,
    so one decomposition serves every penalty and the error is a quadratic form in 1 / (e + lambda).
    """
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0)
    mean = float(values.mean()) or 1.0
    rotated, held = cross @ vectors, held_cross @ vectors
    linear = (rotated * held).sum(0)
    quadratic = (vectors.T @ held_moment @ vectors) * (rotated.T @ rotated)
    errors = []
    for penalty in PENALTIES:
        gain = 1 / (values + penalty * mean)
        errors.append(float(held_total - 2 * linear @ gain + gain @ quadratic @ gain))
    # Directions that hardly vary decide nothing here, but what a module writes may lie in them, and a small penalty
    # amplifies it: of the penalties that serve about as well, the largest is taken. Between models that compute the
    # same there is nothing to amplify, and the best is.
    least = min(errors)
    limit = _TOLERANCE * least if least > _EXACT * held_total else least
    good = [index for index, error in enumerate(errors) if error <= limit]
    return PENALTIES[good[-1]], 1 - errors[good[-1]] / held_total if held_total else 0.0


def ridge_solution(moment: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """cross (moment + lambda I)^-1, [k, d]; lambda relative to the mean diagonal of the moment."""
    regularised = moment + penalty * (float(moment.diagonal().mean()) or 1.0) * torch.eye(
        len(moment), dtype=moment.dtype, device=moment.device
    )
    solution: Tensor = torch.linalg.solve(regularised, cross.T)
    return solution.T.contiguous()


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("copy"),
        Method("prune-align", solve=assign_by_correlation),
        Method("ridge", solve=regress, moments=("cross", "teacher", "student"), holds_out=True),
        Method("procrustes", solve=rotate),
        Method("functional", solve=assign_by_correlation, fits_shifts=True),
        Method("prune-align-published", solve=assign_by_correlation, writes_through_input=True),
    )
}

#: What is tried, in this order, when no method is named and there is text to judge by.
AUTO = ("copy", "prune-align", "procrustes", "ridge", "functional")
