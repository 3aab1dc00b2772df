"""Methods that were tried and did not become part of the package; ``ablation.toml`` compares them.

Each takes statistics of paired activations, of most pairs and of held-out ones, and returns a map and diagnostics.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from peft_graft.alignment.maps import LinearMap, Selection
from peft_graft.alignment.methods import METHODS, register_method


@register_method("nothing", summary="prune-align at a thousandth of its scale, so that only the head carries")
def nothing(fit, held_out):
    found, diagnostics = METHODS["prune-align"].solve(fit, held_out)
    writing = found.apply(torch.eye(found.teacher_size, dtype=torch.float64), 0, "write")
    reading = found.apply(torch.eye(found.teacher_size, dtype=torch.float64), 1, "read")
    return LinearMap(reading, writing * 1e-3, torch.zeros(found.teacher_size, dtype=torch.float64)), diagnostics


@register_method("prune-align-absolute", summary="assignment on absolute correlation; units may change sign")
def absolute_assignment(fit, held_out):
    correlation = fit.merge(held_out).correlation().cpu().numpy()
    rows, columns = linear_sum_assignment(abs(correlation), maximize=True)
    writing = torch.zeros(correlation.shape, dtype=torch.float64)
    writing[rows, columns] = torch.from_numpy(np.sign(correlation[rows, columns]))
    return LinearMap(writing.T.contiguous(), writing, torch.zeros(correlation.shape[1], dtype=torch.float64)), {}


@register_method("prune-align-scaled", summary="assignment, every pair scaled by its own regression")
def scaled_assignment(fit, held_out):
    whole = fit.merge(held_out)
    correlation = whole.correlation().cpu().numpy()
    rows, columns = map(torch.from_numpy, linear_sum_assignment(correlation, maximize=True))
    cross = whole.cross[rows, columns]
    reading = torch.zeros(whole.cross.T.shape, dtype=torch.float64)
    writing = torch.zeros(whole.cross.shape, dtype=torch.float64)
    reading[columns, rows] = cross / whole.student_variance_sum[rows].clamp_min(1e-12)
    writing[rows, columns] = cross / whole.teacher_variance_sum[columns].clamp_min(1e-12)
    return LinearMap(reading, writing, whole.teacher_mean - reading @ whole.student_mean), {}


@register_method("optimal-transport", summary="entropic transport between units at cost 1 - correlation")
def transport(fit, held_out):
    import ot

    correlation = fit.merge(held_out).correlation().cpu().numpy()
    d_s, d_t = correlation.shape
    plan = ot.sinkhorn(np.full(d_s, 1 / d_s), np.full(d_t, 1 / d_t), 1 - correlation, reg=0.02, numItermax=2000)
    plan = torch.from_numpy(plan)  # its barycentres are the maps
    return LinearMap((plan * d_t).T.contiguous(), plan * d_s, torch.zeros(d_t, dtype=torch.float64)), {}


@register_method(
    "gromov-wasserstein",
    summary="Gromov-Wasserstein on the units' own correlations within each model, hardened",
    moments=("cross", "teacher", "student"),
)
def gromov(fit, held_out):
    import ot

    whole = fit.merge(held_out)

    def inner(moment):
        deviation = moment.diagonal().sqrt().clamp_min(1e-12)
        return (1 - (moment / torch.outer(deviation, deviation)).abs()).numpy()

    plan = ot.gromov.gromov_wasserstein(inner(whole.student_moment), inner(whole.teacher_moment), max_iter=50)
    rows, columns = linear_sum_assignment(plan, maximize=True)
    indices = torch.full((plan.shape[0],), -1, dtype=torch.int64)
    indices[rows] = torch.from_numpy(columns)
    return Selection(indices, plan.shape[1]), {}


def _weaker_ridge(share):
    """Ridge that writes with a share of its scale."""

    def solve(fit, held_out):
        found, diagnostics = METHODS["ridge"].solve(fit, held_out)
        return replace(found, writing=found.writing * share) if found.writing is not None else found, diagnostics

    return solve


for _name, _share in (("half", 0.5), ("quarter", 0.25)):
    register_method(
        f"ridge-{_name}",
        summary=f"ridge that writes with {_share:g} of its scale",
        moments=METHODS["ridge"].moments,
        holds_out=True,
    )(_weaker_ridge(_share))
