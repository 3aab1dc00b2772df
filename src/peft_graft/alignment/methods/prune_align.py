"""``prune-align``: correlate units over text and assign them one to one (arXiv 2403.18804)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from peft_graft.alignment.maps import Selection
from peft_graft.alignment.methods.base import Diagnostics, Method, add_method
from peft_graft.alignment.moments import PairedStatistics


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


add_method(Method("prune-align", solve=assign_by_correlation, automatic=True))
# The shortcut of the paper's code, kept to compare with.
add_method(Method("prune-align-published", solve=assign_by_correlation, writes_through_input=True))
