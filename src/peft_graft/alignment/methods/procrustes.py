"""``procrustes``: the best rotation of one space onto the other, with one scale."""

from __future__ import annotations

import torch

from peft_graft.alignment.maps import LinearMap
from peft_graft.alignment.methods.base import Diagnostics, register_method
from peft_graft.alignment.moments import PairedStatistics


@register_method("procrustes", automatic=True)
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
