"""Streaming statistics of paired activations: all that an alignment method ever sees of text and models.

One pass, memory independent of the corpus, mergeable across batches and workers: counts, means and centred
second moments, updated with the pairwise formulas of Chan, Golub and LeVeque (1979). A batch is centred before
its products are taken, so data with a large offset does not cancel, and totals are kept in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Moment = Literal["cross", "teacher", "student"]


@dataclass
class PairedStatistics:
    """Moments of n paired activations x_t [n, d_t] of a teacher space and x_s [n, d_s] of a student space.

    Attributes (float64 tensors on the CPU or the device of the activations):
        count: number of pairs.
        teacher_mean [d_t], student_mean [d_s].
        teacher_variance_sum [d_t], student_variance_sum [d_s]: sums of squared deviations.
        cross [d_s, d_t]: sum of products of deviations, student rows by teacher columns.
        teacher_moment [d_t, d_t], student_moment [d_s, d_s]: the same within each space, only when asked for.
    """

    count: int
    teacher_mean: Tensor
    student_mean: Tensor
    teacher_variance_sum: Tensor
    student_variance_sum: Tensor
    cross: Tensor
    teacher_moment: Tensor | None = None
    student_moment: Tensor | None = None

    @classmethod
    def empty(
        cls, teacher_size: int, student_size: int, moments: Iterable[Moment] = ("cross",), device: str = "cpu"
    ) -> PairedStatistics:
        """No pairs yet; ``moments`` names what a method needs beside the cross moment."""
        wanted = set(moments)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            0,
            zeros(teacher_size),
            zeros(student_size),
            zeros(teacher_size),
            zeros(student_size),
            zeros(student_size, teacher_size),
            zeros(teacher_size, teacher_size) if "teacher" in wanted else None,
            zeros(student_size, student_size) if "student" in wanted else None,
        )

    @classmethod
    def of(cls, teacher: Tensor, student: Tensor, moments: Iterable[Moment] = ("cross",)) -> PairedStatistics:
        """Statistics of one batch, teacher [n, d_t] and student [n, d_s].

        Products are taken in the batch's own precision where only the cross moment is wanted, which a correlation needs
        no better; a regression inverts what it is given, so its products are float64.

        Raises:
            ValueError: the two batches differ in length.
        """
        if len(teacher) != len(student):
            raise ValueError(f"{len(teacher)} teacher activations paired with {len(student)} of the student")
        wanted = set(moments)
        if len(teacher) == 0:
            return cls.empty(teacher.shape[1], student.shape[1], moments, str(teacher.device))
        teacher_mean, student_mean = teacher.double().mean(0), student.double().mean(0)
        t, s = teacher - teacher_mean.to(teacher.dtype), student - student_mean.to(student.dtype)
        if wanted - {"cross"}:
            t, s = teacher.double() - teacher_mean, student.double() - student_mean
        return cls(
            len(teacher),
            teacher_mean,
            student_mean,
            t.double().square().sum(0),
            s.double().square().sum(0),
            (s.T @ t).double(),
            (t.T @ t).double() if "teacher" in wanted else None,
            (s.T @ s).double() if "student" in wanted else None,
        )

    def merge(self, other: PairedStatistics) -> PairedStatistics:
        """Statistics of both sets of pairs together; neither operand is changed."""
        total = self.count + other.count
        if total == 0:
            return self
        weight = self.count * other.count / total
        dt, ds = other.teacher_mean - self.teacher_mean, other.student_mean - self.student_mean

        def moment(mine: Tensor | None, theirs: Tensor | None, left: Tensor, right: Tensor) -> Tensor | None:
            return None if mine is None or theirs is None else mine + theirs + weight * torch.outer(left, right)

        cross = self.cross + other.cross + weight * torch.outer(ds, dt)
        return PairedStatistics(
            total,
            self.teacher_mean + dt * (other.count / total),
            self.student_mean + ds * (other.count / total),
            self.teacher_variance_sum + other.teacher_variance_sum + weight * dt.square(),
            self.student_variance_sum + other.student_variance_sum + weight * ds.square(),
            cross,
            moment(self.teacher_moment, other.teacher_moment, dt, dt),
            moment(self.student_moment, other.student_moment, ds, ds),
        )

    def update(self, teacher: Tensor, student: Tensor) -> None:
        """Take in one batch of pairs, teacher [n, d_t] and student [n, d_s], in place."""
        moments: list[Moment] = ["cross"]
        if self.teacher_moment is not None:
            moments.append("teacher")
        if self.student_moment is not None:
            moments.append("student")
        merged = self.merge(PairedStatistics.of(teacher, student, moments))
        self.__dict__.update(merged.__dict__)

    def _is_constant(self, variance_sum: Tensor, mean: Tensor) -> Tensor:
        # Constant up to rounding: spread below float32's resolution of the unit's own offset, or vanishing beside the
        # other units' (MiniLM's last hidden state has a unit of deviation 1e-32, whose squares underflow).
        deviation = (variance_sum / max(self.count, 1)).sqrt()
        return deviation <= torch.maximum(1e-6 * mean.abs(), 1e-9 * deviation.max())

    def constant_units(self) -> tuple[Tensor, Tensor]:
        """Boolean masks [d_t] and [d_s] of units that do not vary over the pairs."""
        return (
            self._is_constant(self.teacher_variance_sum, self.teacher_mean),
            self._is_constant(self.student_variance_sum, self.student_mean),
        )

    def correlation(self) -> Tensor:
        """Pearson correlation of student unit i with teacher unit j, [d_s, d_t]; 0 where either does not vary."""
        teacher_constant, student_constant = self.constant_units()
        scale = torch.outer(self.student_variance_sum.sqrt(), self.teacher_variance_sum.sqrt())
        correlation = self.cross / scale.clamp_min(torch.finfo(torch.float64).tiny)
        correlation[student_constant, :] = 0
        correlation[:, teacher_constant] = 0
        return correlation.clamp(-1, 1)
