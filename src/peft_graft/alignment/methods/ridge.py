"""``ridge``: regression between the spaces, one map for reading and one for writing, shrunk by held-out text."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_graft.alignment.maps import LinearMap
from peft_graft.alignment.methods.base import Diagnostics, register_method
from peft_graft.alignment.moments import PairedStatistics

#: Ridge penalties to choose from, relative to the mean variance of the units that are read.
PENALTIES = tuple(10.0**power for power in (-10, -8, -6, -5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 1))

_TOLERANCE = 1.02  # of the least held-out error
_EXACT = 1e-6  # a relation that leaves less of the variance unexplained is one without noise


@register_method("ridge", moments=("cross", "teacher", "student"), holds_out=True, automatic=True)
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
