"""Maps and the methods that find them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from peft_graft.alignment.alignment import Alignment, copy_alignment, solve_alignment
from peft_graft.alignment.maps import LinearMap, Selection
from peft_graft.alignment.methods import METHODS
from peft_graft.alignment.methods.prune_align import assign_by_correlation
from peft_graft.alignment.methods.ridge import regress
from peft_graft.alignment.moments import PairedStatistics
from peft_graft.errors import AlignmentError, OutputError
from peft_graft.models.spaces import TOKENS_OUT, Space
from peft_graft.modules.head import Head, head_tensors
from peft_graft.projection import project

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
    alignment.save_pretrained(tmp_path / "a")
    loaded = Alignment.from_pretrained(tmp_path / "a")
    assert (loaded.method, loaded.teacher, loaded.student) == ("prune-align", "teacher", "student")
    assert loaded.maps.keys() == alignment.maps.keys()
    for pair, space_map in alignment.maps.items():
        assert torch.equal(loaded.map(pair).indices, space_map.indices)
        assert loaded.map(pair).teacher_size == space_map.teacher_size
    assert loaded.diagnostics[PAIR] == {"mean_correlation": 0.5}
    assert loaded.details["text"] == "here"
    with pytest.raises(OutputError, match="exists already"):
        alignment.save_pretrained(tmp_path / "a")


def test_a_missing_pair_says_how_to_get_it() -> None:
    with pytest.raises(AlignmentError, match=r"teacher layer 0 attn\.in -> student layer 0 attn\.in.*peft-graft align"):
        Alignment("prune-align", "t", "s", {}).map(PAIR)


def test_a_folder_without_alignment(tmp_path) -> None:
    with pytest.raises(AlignmentError, match="~nobody-of-this-name/a: the folder cannot be opened"):
        Alignment.from_pretrained("~nobody-of-this-name/a")
    with pytest.raises(AlignmentError, match="holds no alignment"):
        Alignment.from_pretrained(tmp_path)


def test_methods_are_named_as_their_keys() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert not METHODS["copy"].needs_text


def _rotated_pair(rows: int = 400, width: int = 12):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(rows, width, generator=generator) * torch.linspace(0.2, 3, width) + 2
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return teacher, rotation


def _both(teacher: torch.Tensor, student: torch.Tensor) -> tuple[PairedStatistics, PairedStatistics]:
    moments = ("cross", "teacher", "student")
    return (PairedStatistics.of(teacher[:300], student[:300], moments),
            PairedStatistics.of(teacher[300:], student[300:], moments))  # fmt: skip


@pytest.mark.parametrize("method", ["procrustes", "ridge"])
def test_a_planted_rotation_and_scale_are_found(method: str) -> None:
    teacher, rotation = _rotated_pair()
    student = 0.5 * teacher @ rotation.T + 1
    found, diagnostics = METHODS[method].solve(*_both(teacher, student))
    torch.testing.assert_close(found.reading, 2 * rotation.T.double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.writing, 0.5 * rotation.double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(student @ found.reading.T.float() + found.shift.float(), teacher, atol=1e-3, rtol=0)
    assert diagnostics["read_explained"] == pytest.approx(1, abs=1e-5)


def test_ridge_shrinks_by_held_out_pairs_and_beats_assignment_on_them() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, rotation = _rotated_pair()
    student = teacher @ rotation.T + torch.randn(400, 12, generator=generator)
    fit, held_out = _both(teacher, student)
    ridge, diagnostics = regress(fit, held_out)
    assert 0 < diagnostics["read_explained"] < 1
    assigned, _ = assign_by_correlation(fit, held_out)
    centred_t, centred_s = (x[300:].double() - x[300:].double().mean(0) for x in (teacher, student))

    def error(space_map) -> float:
        return float(
            (centred_t - centred_s @ space_map.apply(torch.eye(12, dtype=torch.float64), 1, "read").T).square().sum()
        )

    assert error(ridge) < 0.5 * error(assigned)
    assert 1 - error(ridge) / float(centred_t.square().sum()) == pytest.approx(diagnostics["read_explained"], abs=0.05)


def test_a_reading_maps_constant_goes_into_the_bias_that_reads() -> None:
    teacher, rotation = _rotated_pair()
    student = teacher @ rotation.T - 3
    found, _ = regress(*_both(teacher, student))
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(4, 12, generator=generator), torch.randn(4, generator=generator)
    head = Head(
        "token-classification", head_tensors({"out.weight": weight, "out.bias": bias}, TOKENS_OUT), TOKENS_OUT, ()
    )
    moved = project(head, lambda axis: found)
    given = student @ moved.tensors["out.weight"].values.T + moved.tensors["out.bias"].values
    torch.testing.assert_close(given, teacher @ weight.T + bias, atol=1e-2, rtol=0)


def test_a_linear_map_survives_the_file_and_refuses_what_scales_single_units(tmp_path) -> None:
    teacher, rotation = _rotated_pair()
    found, diagnostics = regress(*_both(teacher, teacher @ rotation.T))
    alignment = Alignment("ridge", "a", "b", {PAIR: found}, {PAIR: diagnostics})
    alignment.save_pretrained(tmp_path / "alignment")
    again = Alignment.from_pretrained(tmp_path / "alignment").map(PAIR)
    assert isinstance(again, LinearMap)
    torch.testing.assert_close(again.reading.double(), found.reading, atol=1e-6, rtol=1e-5)
    with pytest.raises(AlignmentError, match="scale single units"):
        again.apply(torch.ones(12), 0, "read")
    with pytest.raises(AlignmentError, match="does not fit this axis"):
        again.apply(torch.ones(3, 11), 1, "read")


def test_a_map_of_one_direction_survives_the_file_and_refuses_the_other(tmp_path) -> None:
    teacher, rotation = _rotated_pair()
    fit, held_out = _both(teacher, teacher @ rotation.T)
    fit.student_moment = held_out.student_moment = None
    found, diagnostics = regress(fit, held_out)
    assert found.reading is None
    assert "read_explained" not in diagnostics
    Alignment("ridge", "a", "b", {PAIR: found}, {PAIR: diagnostics}).save_pretrained(tmp_path / "alignment")
    again = Alignment.from_pretrained(tmp_path / "alignment").map(PAIR)
    assert (again.teacher_size, again.student_size) == (12, 12)
    whole, _ = regress(*_both(teacher, teacher @ rotation.T))
    weight = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(again.apply(weight, 0, "write"), whole.apply(weight, 0, "write"), rtol=0, atol=1e-6)
    with pytest.raises(AlignmentError, match="no map for what reads here"):
        again.apply(weight, 1, "read")


def test_layers_solved_in_threads_give_what_they_give_one_by_one() -> None:
    teacher, rotation = _rotated_pair()
    student = teacher @ rotation.T
    parts = {(Space(layer, "attn.in"),) * 2: _both(teacher.roll(layer, 1), student) for layer in range(4)}
    threads = torch.get_num_threads()
    alone = solve_alignment(METHODS["ridge"], parts, "a", "b", {})
    try:
        torch.set_num_threads(2)
        together = solve_alignment(METHODS["ridge"], parts, "a", "b", {})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for pair, found in alone.maps.items():
        torch.testing.assert_close(together.map(pair).reading, found.reading)
        assert together.diagnostics[pair] == pytest.approx(alone.diagnostics[pair])


def test_pairs_that_share_a_map_survive_the_file(tmp_path) -> None:
    shared = Selection(torch.tensor([1, 0]), 2)
    other = (Space(0, "layer.out"), Space(0, "layer.out"))
    Alignment("prune-align", "a", "b", {PAIR: shared, other: shared}).save_pretrained(tmp_path / "alignment")
    loaded = Alignment.from_pretrained(tmp_path / "alignment")
    assert torch.equal(loaded.map(PAIR).indices, loaded.map(other).indices)
