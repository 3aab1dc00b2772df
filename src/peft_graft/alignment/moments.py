"""Streaming statistics of paired activations: all that an alignment method ever sees of text and models.

One pass, memory independent of the corpus, mergeable across batches and workers: counts, means and centred
second moments, merged with the pairwise formulas of Chan, Golub and LeVeque (1979). Data are shifted by the mean of
the first batch before their products are taken, so a large offset does not cancel, and totals are kept in float64.

``Products`` streams any number of tensors at once, each product taken once however many pairs share it;
``PairedStatistics`` is what a method sees of one pair.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from peft_graft.processes import Processes

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
        """No pairs yet, in no memory to speak of; ``moments`` names what a method needs beside the cross moment."""
        wanted = set(moments)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros((), dtype=torch.float64, device=device).expand(shape)

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
        if other.count == 0:
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


#: Products of wide tensors with themselves are taken by blocks of at least this many columns, the upper ones only.
_LEAST_BLOCK, _MOST_BLOCKS = 192, 4
#: Rows of a tensor, or of a product's factors, that are squared or made float64 at a time: a passing copy of all of
#: them costs more than the arithmetic.
_ROWS, _ROWS_OF_FACTORS = 256, 1024
#: Rows whose float32 products are summed in float32: adding every batch's to float64 totals costs a tenth of a pass.
_ROWS_OF_PARTIALS = 8192


class Doubles(threading.local):
    """Float64 copies of rows, in buffers that every thread keeps: fresh pages would take longer than the copy."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int, torch.device], Tensor] = {}

    def __call__(self, place: str, rows: Tensor) -> Tensor:
        """The rows themselves where they are float64, else a copy that lasts until the next one in this place."""
        if rows.dtype == torch.float64:
            return rows
        key = (place, rows.shape[1], rows.device)
        if key not in self._held or len(self._held[key]) < len(rows):
            size = max(len(rows), _ROWS_OF_FACTORS), rows.shape[1]
            with torch.inference_mode(False):  # written to inside the mode and outside, as totals are
                self._held[key] = torch.empty(size, dtype=torch.float64, device=rows.device)
        return self._held[key][: len(rows)].copy_(rows)


class Products:
    """Streaming sums over the rows of several tensors: means, squared deviations, and the products asked for.

    Tensors go by name; the product of (a, b) is the sum over rows of a's deviations times b's, [d_a, d_b].

    Args:
        sizes: width of every tensor by name.
        wanted: the pairs of names whose products are kept; a name with itself for a tensor's own second moment.
        precise: take products in float64 and not in the precision of the rows, for methods that invert moments.
        device: of the totals, all float64.
        doubles: buffers for copies, which several may share.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        wanted: Iterable[tuple[str, str]],
        *,
        precise: bool = False,
        device: torch.device | str = "cpu",
        doubles: Doubles | None = None,
    ) -> None:
        self.count = 0
        self._doubles = doubles or Doubles()
        self.precise = precise
        self._centred = False

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        with torch.inference_mode(False):  # totals are added to in place, inside the mode and outside
            self._shift = {name: zeros(size) for name, size in sizes.items()}
            self._sum = {name: zeros(size) for name, size in sizes.items()}
            self._squares = {name: zeros(size) for name, size in sizes.items()}
            self._product = {(a, b): zeros(sizes[a], sizes[b]) for a, b in wanted}
        # Products of rows that the totals do not have yet, in the precision of the rows.
        self._partial: dict[tuple[str, str], Tensor] = {}
        self._rows_of_partials = 0

    def update(self, rows: Mapping[str, Tensor]) -> int:
        """Take in paired rows, [n, d] float32 or float64 for every name; they are overwritten.

        Returns:
            How many rows were left out because one of the tensors is not finite there.

        Raises:
            ValueError: the tensors differ in length, or the totals have been read already.
        """
        lengths = {len(rows[name]) for name in self._sum}
        if len(lengths) > 1 or self._centred:
            raise ValueError("the totals have been read" if self._centred else f"rows of lengths {sorted(lengths)}")
        if not lengths or lengths == {0}:
            return 0
        left_out = 0
        if not self.count:
            rows, left_out = _finite(rows, {name: rows[name].sum(0) for name in self._sum})
            if len(next(iter(rows.values()))) == 0:
                return left_out
            # Kept in the precision of the rows, so that what is subtracted is exactly what is added back.
            self._shift = {name: rows[name].mean(0) for name in self._sum}
        for name in self._sum:
            rows[name].sub_(self._shift[name])
        sums = {name: rows[name].sum(0) for name in self._sum}
        if self.count:
            kept, left_out = _finite(rows, sums)
            if left_out:
                rows, sums = kept, {name: kept[name].sum(0) for name in self._sum}
        for name in self._sum:
            self._sum[name] += sums[name]
            if (name, name) not in self._product:  # whose diagonal says as much
                for part in torch.split(rows[name], _ROWS):
                    self._squares[name] += part.square().sum(0)
        for a, b in self._product:
            self._add_product(a, b, rows)
        count = len(next(iter(rows.values())))
        self.count += count
        self._rows_of_partials += count
        if self._rows_of_partials >= _ROWS_OF_PARTIALS:
            self._add_partials()
        return left_out

    def _add_product(self, a: str, b: str, rows: Mapping[str, Tensor]) -> None:
        total = self._product[a, b]
        if not self.precise and rows[a].dtype != total.dtype:
            if (a, b) not in self._partial:
                with torch.inference_mode(False):  # see the totals
                    self._partial[a, b] = torch.zeros_like(total, dtype=rows[a].dtype)
            _add(self._partial[a, b], rows[a], rows[b], symmetric=a == b)
            return
        for left, right in zip(*(torch.split(rows[name], _ROWS_OF_FACTORS) for name in (a, b)), strict=True):
            left = self._doubles("left", left)
            _add(total, left, left if a == b else self._doubles("right", right), symmetric=a == b)

    def _add_partials(self) -> None:
        """Bring the totals up to date; of symmetric ones only what is on and above the diagonal is."""
        for pair, partial in self._partial.items():
            for total, part in zip(torch.split(self._product[pair], _ROWS), torch.split(partial, _ROWS), strict=True):
                total += part
            partial.zero_()
        self._rows_of_partials = 0

    def _settle(self) -> None:
        """Bring the totals up to date, the lower halves of symmetric ones too."""
        self._add_partials()
        for (a, b), product in self._product.items():
            if a == b:
                for start, end in _strips(len(product)):
                    product[end:, start:end] = product[start:end, end:].T

    def tensors(self) -> dict[str, Tensor]:
        """All of the state by key, to be stored or sent; ``load`` reverses it.

        Nothing is added up for it, so that the sums are the same whenever the state is stored.
        """
        found = {"count": torch.tensor(self.count), "rows of partials": torch.tensor(self._rows_of_partials)}
        for part in ("shift", "sum", "squares"):
            found |= {f"{part} {name}": value for name, value in getattr(self, f"_{part}").items()}
        if self._rows_of_partials:
            found |= {f"partial {a} {b}": value for (a, b), value in self._partial.items()}
        return found | {f"product {a} {b}": value for (a, b), value in self._product.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state of the same products, in place of this one."""
        self.count = int(tensors["count"])
        self._partial.clear()
        self._rows_of_partials = int(tensors.get("rows of partials", 0))
        with torch.inference_mode(False):
            for (a, b), value in self._product.items():
                if (partial := tensors.get(f"partial {a} {b}")) is not None:
                    self._partial[a, b] = partial.to(value.device).clone()
            for part in ("shift", "sum", "squares"):
                held = getattr(self, f"_{part}")
                held.update({name: tensors[f"{part} {name}"].to(value.device).clone() for name, value in held.items()})
            for (a, b), value in self._product.items():
                self._product[a, b] = tensors[f"product {a} {b}"].to(value.device).clone()

    def merge(self, other: Products) -> None:
        """Take in the rows that another one of the same products has seen; that one is only shifted."""
        self._settle()
        if not self.count:
            self._shift = dict(other._shift)
        other._settle()
        other._shift_to(self._shift)
        for name in self._sum:
            self._sum[name] += other._sum[name]
            self._squares[name] += other._squares[name]
        for pair in self._product:
            self._product[pair] += other._product[pair]
        self.count += other.count

    def merge_processes(self, processes: Processes) -> None:
        """Take in the rows that the other processes have seen, in all of them alike."""
        self._settle()

        def total(value: Tensor) -> Tensor:
            there = value.cpu()  # gloo sums on the CPU
            processes.add_up([there])
            return value.copy_(there)

        counts = total(torch.tensor([self.count], dtype=torch.float64))
        everyone = max(1, int(counts))
        self._shift_to({
            name: total(self.count * self._shift[name].double() + value) / everyone
            for name, value in self._sum.items()
        })  # fmt: skip
        for value in (*self._sum.values(), *self._squares.values(), *self._product.values()):
            total(value)
        self.count = int(counts)

    def _shift_to(self, shift: Mapping[str, Tensor]) -> None:
        """Express settled totals by another shift: x - theirs = (x - mine) + gap."""
        gap = {name: mine.double() - shift[name].double() for name, mine in self._shift.items()}
        for (a, b), product in self._product.items():
            # (sum_a) gap_b + gap_a (sum_b) + n gap_a gap_b, in two outer products.
            product.addr_(self._sum[a] + self.count * gap[a], gap[b].to(product.device))
            product.addr_(gap[a], self._sum[b].to(product.device))
        for name, difference in gap.items():
            self._squares[name] += difference * (2 * self._sum[name] + self.count * difference)
            self._sum[name] += self.count * difference
        self._shift = dict(shift)

    def statistics(self, teacher: str, student: str, moments: Iterable[Moment]) -> PairedStatistics:
        """What a method sees of two of the tensors, whose product (student, teacher) was asked for.

        Its tensors are those of the totals, so the first call ends the stream.
        """
        if not self._centred:
            share = max(1, self.count)
            self._settle()
            self._partial.clear()
            self._shift_to({name: value.double() + self._sum[name] / share for name, value in self._shift.items()})
            self._centred = True
        wanted = set(moments)
        return PairedStatistics(
            self.count,
            self._shift[teacher],
            self._shift[student],
            self._spread(teacher),
            self._spread(student),
            self._product[student, teacher],
            self._product[teacher, teacher] if "teacher" in wanted else None,
            self._product[student, student] if "student" in wanted else None,
        )

    def _spread(self, name: str) -> Tensor:
        own = self._product.get((name, name))
        return (self._squares[name] if own is None else own.diagonal()).clamp_min(0)


def _finite(rows: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], int]:
    """The rows at which every tensor is finite, and how many are not; sums tell whether to look at all."""
    if all(bool(torch.isfinite(value).all()) for value in sums.values()):
        return rows, 0
    finite = torch.stack([torch.isfinite(rows[name]).all(1).cpu() for name in sums]).all(0)
    return {name: rows[name][finite.to(rows[name].device)] for name in sums}, int((~finite).sum())


def _add(total: Tensor, a: Tensor, b: Tensor, *, symmetric: bool) -> None:
    """total += a^T b; of a symmetric one only the strips on and above the diagonal."""
    for start, end in _strips(len(total)) if symmetric else [(0, len(total))]:
        first = start if symmetric else 0
        total[start:end, first:].addmm_(a[:, start:end].T, b[:, first:].to(a.device))


def _strips(width: int) -> Iterator[tuple[int, int]]:
    """The rows [start, end) that a product of a wide tensor with itself is taken by."""
    blocks = max(1, min(_MOST_BLOCKS, width // _LEAST_BLOCK))
    return itertools.pairwise(width * index // blocks for index in range(blocks + 1))
