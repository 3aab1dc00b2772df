"""Laws of the streaming statistics: chunked = whole = merged, against numpy in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_graft.alignment import moments as statistics
from peft_graft.alignment.moments import PairedStatistics, Products

ALL = ("cross", "teacher", "student")


def batch(n: int, offset: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    teacher = shared @ torch.randn(3, 5, generator=generator, dtype=torch.float64)
    student = shared @ torch.randn(3, 4, generator=generator, dtype=torch.float64)
    teacher = teacher + 0.3 * torch.randn(n, 5, generator=generator, dtype=torch.float64) + offset
    student = student + 0.3 * torch.randn(n, 4, generator=generator, dtype=torch.float64) - offset
    return teacher.to(dtype), student.to(dtype)


def assert_same(one: PairedStatistics, other: PairedStatistics, rtol: float = 1e-9) -> None:
    assert one.count == other.count
    for name, value in one.__dict__.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, getattr(other, name), rtol=rtol, atol=1e-9)


def streamed(teacher: torch.Tensor, student: torch.Tensor, edges: list[int], precise: bool = False) -> Products:
    products = Products({"t": 5, "s": 4}, [("s", "t"), ("t", "t"), ("s", "s")], precise=precise)
    for start, end in itertools.pairwise(edges):
        products.update({"t": teacher[start:end].clone(), "s": student[start:end].clone()})
    return products


@given(st.lists(st.integers(1, 39), max_size=5), st.integers(0, 1000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_streamed_equals_whole(cuts: list[int], seed: int, precise: bool) -> None:
    teacher, student = batch(40, seed=seed)
    whole = PairedStatistics.of(teacher, student, ALL)
    found = streamed(teacher, student, [0, *sorted(cuts), 40], precise)
    assert_same(whole, found.statistics("t", "s", ALL))


@pytest.mark.parametrize("precise", [False, True])
def test_sums_do_not_depend_on_when_they_are_stored(precise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_ROWS_OF_PARTIALS", 45)
    teacher, student = batch(100, offset=30, dtype=torch.float32)
    undisturbed, stored, resumed = (streamed(teacher, student, [0], precise) for _ in range(3))
    for start in range(0, 100, 10):
        for products in (undisturbed, stored, resumed):
            products.update({"t": teacher[start : start + 10].clone(), "s": student[start : start + 10].clone()})
        stored.tensors()
        state = {key: value.clone() for key, value in resumed.tensors().items()}
        resumed = streamed(teacher, student, [0], precise)
        resumed.load(state)
    expected = undisturbed.statistics("t", "s", ALL)
    for products in (stored, resumed):
        found = products.statistics("t", "s", ALL)
        for name in ("cross", "teacher_moment", "student_moment", "teacher_mean", "student_variance_sum"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("precise", [False, True])
def test_float32_rows_are_summed_in_parts(precise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_ROWS_OF_PARTIALS", 15)
    teacher, student = batch(100, offset=30, dtype=torch.float32)
    whole = PairedStatistics.of(teacher.double(), student.double(), ALL)
    found = streamed(teacher, student, [0, 10, 20, 31, 40], precise)  # added to the totals after 20 rows, and at 40
    again = streamed(teacher, student, [0])
    again.load(found.tensors())  # after the last addition
    for products in (found, again):
        for start, end in ((40, 52), (52, 90)):
            products.update({"t": teacher[start:end].clone(), "s": student[start:end].clone()})
        products.merge(streamed(teacher, student, [90, 100], precise))
    for products in (found, again):
        one = products.statistics("t", "s", ALL)
        assert one.count == whole.count
        for name in ("cross", "teacher_moment", "student_moment"):
            torch.testing.assert_close(getattr(one, name), getattr(whole, name), rtol=1e-5, atol=1e-4)


@given(st.permutations(range(4)), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_products_merge_in_any_order(order: list[int], seed: int) -> None:
    teacher, student = batch(40, offset=5, seed=seed)
    whole = PairedStatistics.of(teacher, student, ALL)
    edges = [0, 3, 11, 30, 40]
    parts = [streamed(teacher, student, edges[index : index + 2]) for index in range(4)]
    merged = streamed(teacher, student, [0])
    for index in order:
        again = streamed(teacher, student, [0])
        again.load(parts[index].tensors())
        merged.merge(again)
    assert_same(whole, merged.statistics("t", "s", ALL))


def test_products_go_on_after_a_merge() -> None:
    teacher, student = batch(40, offset=300)
    found = streamed(teacher, student, [0, 10])
    found.merge(streamed(teacher, student, [10, 25]))
    found.update({"t": teacher[25:].clone(), "s": student[25:].clone()})
    assert_same(PairedStatistics.of(teacher, student, ALL), found.statistics("t", "s", ALL))
    with pytest.raises(ValueError, match="have been read"):
        found.update({"t": teacher, "s": student})


def test_a_wide_tensors_own_product_is_taken_by_blocks() -> None:
    x = torch.randn(50, 1100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = Products({"x": 1100}, [("x", "x")])
    products.update({"x": x.clone()})
    moment = products.statistics("x", "x", ["teacher"]).teacher_moment
    centred = x - x.mean(0)
    torch.testing.assert_close(moment, centred.T @ centred)


def test_rows_that_are_not_finite_are_left_out_of_every_product() -> None:
    teacher, student = batch(40)
    good = [row for row in range(40) if row not in (0, 25)]
    whole = PairedStatistics.of(teacher[good], student[good], ALL)
    teacher[0, 2], student[25, 1] = float("nan"), float("inf")
    products = Products({"t": 5, "s": 4}, [("s", "t"), ("t", "t"), ("s", "s")])
    left = [products.update({"t": teacher[rows].clone(), "s": student[rows].clone()})
            for rows in (slice(0, 1), slice(1, 20), slice(20, 40))]  # fmt: skip
    assert left == [1, 0, 1]
    assert_same(whole, products.statistics("t", "s", ALL))


@given(st.permutations(range(4)), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_merging_in_any_order(order: list[int], seed: int) -> None:
    parts = [batch(7 + index, seed=seed + index) for index in range(4)]
    whole = PairedStatistics.of(torch.cat([t for t, _ in parts]), torch.cat([s for _, s in parts]), ALL)
    merged = PairedStatistics.empty(5, 4, ALL)
    for index in order:
        merged = merged.merge(PairedStatistics.of(*parts[index], ALL))
    assert_same(whole, merged)


def test_merging_changes_neither_operand() -> None:
    one, other = PairedStatistics.of(*batch(9)), PairedStatistics.of(*batch(11, seed=1))
    before = one.cross.clone()
    one.merge(other)
    assert torch.equal(one.cross, before)
    assert one.count == 9


def test_correlation_is_numpys() -> None:
    teacher, student = batch(50)
    expected = np.corrcoef(student.numpy().T, teacher.numpy().T)[:4, 4:]
    np.testing.assert_allclose(PairedStatistics.of(teacher, student).correlation().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_float32_data_with_an_offset_does_not_cancel(offset: float) -> None:
    teacher, student = batch(4000, offset, dtype=torch.float32)
    exact = PairedStatistics.of(teacher.double(), student.double()).correlation()
    found = streamed(teacher, student, list(range(0, 4001, 125))).statistics("t", "s", ())
    torch.testing.assert_close(found.correlation(), exact, rtol=0, atol=2e-5)


def test_constant_units_are_found_and_have_no_correlation() -> None:
    teacher, student = batch(30)
    teacher[:, 2], student[:, 0] = 7.25, 0.0
    statistics = PairedStatistics.of(teacher.float(), student.float())
    of_teacher, of_student = statistics.constant_units()
    assert of_teacher.tolist() == [False, False, True, False, False]
    assert of_student.tolist() == [True, False, False, False]
    correlation = statistics.correlation()
    assert not correlation[0].any()
    assert not correlation[:, 2].any()
    assert bool(torch.isfinite(correlation).all())


def test_a_unit_whose_spread_vanishes_beside_the_others_counts_as_constant() -> None:
    teacher, student = batch(30)
    teacher[:, 1] *= 1e-32
    of_teacher, of_student = PairedStatistics.of(teacher.float(), student.float()).constant_units()
    assert of_teacher.tolist() == [False, True, False, False, False]
    assert not of_student.any()


def test_moments_that_were_not_asked_for_are_not_kept() -> None:
    statistics = PairedStatistics.of(*batch(5))
    assert statistics.teacher_moment is None
    assert statistics.student_moment is None


def test_no_pairs_yet() -> None:
    empty = streamed(*batch(0), [0, 0]).statistics("t", "s", ())
    assert empty.count == 0
    assert not empty.correlation().any()


def test_unpaired_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="paired"):
        PairedStatistics.of(torch.zeros(3, 5), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="lengths"):
        streamed(torch.zeros(3, 5), torch.zeros(2, 4), [0, 3])


def test_a_stream_may_begin_in_inference_mode_and_go_on_outside() -> None:
    teacher, student = batch(60, dtype=torch.float32)
    products = Products({"t": 5, "s": 4}, [("s", "t"), ("t", "t"), ("s", "s")], precise=True)
    with torch.inference_mode():
        products.update({"t": teacher[:40].clone(), "s": student[:40].clone()})
    products.update({"t": teacher[40:].clone(), "s": student[40:].clone()})
    whole = streamed(teacher, student, [0, 40, 60], precise=True)
    assert_same(products.statistics("t", "s", ALL), whole.statistics("t", "s", ALL))
