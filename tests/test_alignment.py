"""Maps and the methods that find them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from peft_graft.alignment import Alignment, copy_alignment
from peft_graft.alignment_files import load_alignment, save_alignment
from peft_graft.errors import AlignmentError, OutputError
from peft_graft.maps import Selection
from peft_graft.methods import METHODS, assign_by_correlation
from peft_graft.modules import Space
from peft_graft.statistics import PairedStatistics

PAIR = (Space(0, "attn.in"), Space(0, "attn.in"))


@given(st.permutations(range(8)), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_a_planted_permutation_is_found(order: list[int], seed: int) -> None:
    teacher = torch.randn(60, 8, generator=torch.Generator().manual_seed(seed)) * torch.rand(8) + 3
    space_map, diagnostics = assign_by_correlation(PairedStatistics.of(teacher, teacher[:, order]))
    assert space_map.indices.tolist() == order
    assert diagnostics["mean_correlation"] == pytest.approx(1, abs=1e-5)


def test_the_assignment_maximises_the_summed_signed_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(40, 9, generator=generator), torch.randn(40, 6, generator=generator)
    statistics = PairedStatistics.of(teacher, student)
    correlation = statistics.correlation().numpy()
    rows, columns = linear_sum_assignment(-correlation)
    space_map, _ = assign_by_correlation(statistics)
    assert space_map.indices[rows].tolist() == columns.tolist()


def test_a_wider_student_has_unmatched_units_that_read_and_write_nothing() -> None:
    teacher = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    space_map, diagnostics = assign_by_correlation(PairedStatistics.of(teacher, torch.cat([noise, teacher], 1)))
    assert space_map.indices.tolist() == [-1, -1, 0, 1, 2, 3]
    assert diagnostics["unmatched_student_units"] == 2
    weight = torch.arange(12.0).reshape(3, 4)
    moved = space_map.apply(weight, 1, "read")
    assert moved.shape == (3, 6)
    assert not moved[:, :2].any()
    assert torch.equal(moved[:, 2:], weight)


def test_units_without_variance_are_matched_last_and_counted() -> None:
    teacher = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    student = teacher.clone()
    student[:, 1] = 5.0
    space_map, diagnostics = assign_by_correlation(PairedStatistics.of(teacher, student))
    assert space_map.indices.tolist() == [0, 1, 2, 3]
    assert diagnostics["constant_student_units"] == 1


def test_identity_copies_bit_for_bit_and_keeps_the_dtype() -> None:
    weight = torch.randn(3, 5).to(torch.bfloat16)
    moved = Selection.identity(5).apply(weight, 1, "write")
    assert torch.equal(moved, weight)
    assert moved.dtype == torch.bfloat16


def test_a_map_refuses_an_axis_of_another_size() -> None:
    with pytest.raises(AlignmentError, match="expected size 5, found 4"):
        Selection.identity(5).apply(torch.zeros(4), 0, "read")


def test_copy_refuses_spaces_of_different_size() -> None:
    with pytest.raises(AlignmentError, match=r"layer 0 attn\.in.*prune-align"):
        copy_alignment({PAIR: (8, 6)}, "t", "s")


def test_an_alignment_survives_its_files(tmp_path) -> None:
    alignment = Alignment(
        "prune-align",
        "teacher",
        "student",
        {PAIR: Selection(torch.tensor([2, -1, 0]), 3), (Space(-1, "tokens.out"),) * 2: Selection.identity(4)},
        {PAIR: {"mean_correlation": 0.5}},
        {"text": "here"},
    )
    save_alignment(alignment, tmp_path / "a")
    loaded = load_alignment(tmp_path / "a")
    assert (loaded.method, loaded.teacher, loaded.student) == ("prune-align", "teacher", "student")
    assert loaded.maps.keys() == alignment.maps.keys()
    for pair, space_map in alignment.maps.items():
        assert torch.equal(loaded.map(pair).indices, space_map.indices)
        assert loaded.map(pair).teacher_size == space_map.teacher_size
    assert loaded.diagnostics[PAIR] == {"mean_correlation": 0.5}
    assert loaded.details["text"] == "here"
    with pytest.raises(OutputError, match="exists already"):
        save_alignment(alignment, tmp_path / "a")


def test_a_missing_pair_says_how_to_get_it() -> None:
    with pytest.raises(AlignmentError, match=r"teacher layer 0 attn\.in -> student layer 0 attn\.in.*peft-graft align"):
        Alignment("prune-align", "t", "s", {}).map(PAIR)


def test_a_folder_without_alignment(tmp_path) -> None:
    with pytest.raises(AlignmentError, match="holds no alignment"):
        load_alignment(tmp_path)


def test_methods_are_named_as_their_keys() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert not METHODS["copy"].needs_text
