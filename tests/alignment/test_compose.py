"""Laws of composed alignments: between copies of one model in other coordinates they are the direct ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

import tiny
from peft_graft import Alignment
from peft_graft.alignment.alignment import copy_alignment, shape_alignment, solve_alignment
from peft_graft.alignment.compose import compose_maps
from peft_graft.alignment.maps import LinearMap, Selection
from peft_graft.alignment.methods import METHODS
from peft_graft.alignment.moments import PairedStatistics
from peft_graft.errors import AlignmentError
from peft_graft.models.spaces import Space

SIZE = 6


def space(layer: int, name: str = "attn.in") -> Space:
    return Space(layer, name)


def activations(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(200, SIZE, generator=generator, dtype=torch.float64) * torch.arange(1, SIZE + 1) + 2


def rotated(values: torch.Tensor, seed: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    return scale * values @ rotation + seed


def solved(method: str, first: torch.Tensor, second: torch.Tensor, names: str) -> Alignment:
    """The alignment of one layer of two models that are called by a letter each."""
    half = len(first) // 2
    moments = tuple(
        PairedStatistics.of(first[part], second[part], METHODS[method].moments)
        for part in (slice(half), slice(half, None))
    )
    return solve_alignment(METHODS[method], {(space(0), space(0)): moments}, *names, {"teacher": names[0]})


@pytest.mark.parametrize("method", ["procrustes", "ridge"])
def test_composed_rotations_are_the_direct_one(method: str) -> None:
    first = activations()
    second = rotated(first, 1, 3.0)
    third = rotated(second, 2, 0.5)
    composed = Alignment.compose(solved(method, first, second, "AB"), solved(method, second, third, "BC"))
    direct = solved(method, first, third, "AC")
    assert (composed.method, composed.teacher, composed.student) == (method, "A", "C")
    found, expected = (alignment.map((space(0), space(0))) for alignment in (composed, direct))
    for part in ("reading", "writing", "shift"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-6, atol=1e-6)


def test_a_direction_is_composed_on_its_own_and_a_constant_goes_with_reading() -> None:
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((4, 3), (3, 4), (4,), (3, 2), (3,))]
    first, second = LinearMap(made[0], made[1], made[2]), LinearMap(made[3], None, made[4])
    found = compose_maps(first, second)
    assert found.writing is None
    far = torch.randn(2, generator=draw, dtype=torch.float64)
    middle = made[3] @ far + made[4]
    torch.testing.assert_close(found.reading @ far + found.shift, made[0] @ middle + made[2])
    assert compose_maps(LinearMap(None, made[1], made[2]), second) is None
    swapped = Selection(torch.tensor([2, -1, 0]), 3)
    by_selection = compose_maps(first, swapped)
    torch.testing.assert_close(by_selection.reading, torch.stack([made[0][:, 2], 0 * made[0][:, 0], made[0][:, 0]], 1))
    torch.testing.assert_close(by_selection.writing, torch.stack([made[1][2], 0 * made[1][0], made[1][0]]))


def test_a_unit_that_is_lost_on_the_way_stays_lost() -> None:
    found = compose_maps(Selection(torch.tensor([3, -1, 0]), 4), Selection(torch.tensor([2, 1, -1, 0, 2]), 3))
    assert (found.indices.tolist(), found.size) == ([0, -1, -1, 3, 0], 4)


def test_layers_compose() -> None:
    """Every window of windows; a layer that serves two in the middle serves what they serve."""

    def of(pairs: dict[int, list[int]], names: str) -> Alignment:
        return copy_alignment({(space(near), space(far)): (2, 2) for far in pairs for near in pairs[far]}, *names)

    composed = Alignment.compose(of({0: [0, 1], 1: [2, 3], 2: [3]}, "AB"), of({0: [0], 1: [1, 2]}, "BC"))
    assert sorted((near.layer, far.layer) for near, far in composed.maps) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert composed.method == "copy"


def test_what_does_not_compose_is_refused() -> None:
    first, second = activations(), rotated(activations(), 1, 2.0)
    known = solved("procrustes", first, second, "AB")
    for other, message in (
        (solved("procrustes", first, second, "XC"), "the student of the first is not the teacher of the second"),
        (solved("ridge", first, second, "BC"), "alignments by different methods do not compose"),
        (copy_alignment({(space(1), space(0)): (SIZE, SIZE)}, *"BC"), "share no space of the model between"),
        (shape_alignment({(space(0), space(0)): (5, 5)}, *"BC"), "alignments by different methods do not compose"),
        (copy_alignment({(space(0), space(0)): (5, 5)}, *"BC"), "layer 0 attn.in: the alignments have this space in"),
    ):
        with pytest.raises(AlignmentError, match=message):
            Alignment.compose(known, other)


def test_a_module_moves_by_a_composed_alignment_as_by_the_direct_one(command, tmp_path: Path) -> None:
    """Units of three models in three orders: what the command composes is what aligning the ends finds."""
    teacher = tiny.base_model(tmp_path / "A", "bert", layers=1, hidden=16)
    adapted = tiny.peft_lora(tmp_path / "module", teacher)
    before = transformers.AutoModel.from_pretrained(teacher)
    for name, seed in (("B", 3), ("C", 4)):
        before, _ = tiny.permuted(before, seed)
        before.save_pretrained(tmp_path / name)
        tiny.tokenizer(tmp_path / name)
    (tmp_path / "text.txt").write_text("\n".join(tiny.sentences(80)))
    for pair in ("AB", "BC", "AC"):
        tiny.align(
            tmp_path / pair[0],
            tmp_path / pair[1],
            text=tmp_path / "text.txt",
            sites=("attn.query", "attn.value"),
            out=tmp_path / pair,
        )
    done = command("compose", tmp_path / "AB", tmp_path / "BC", "--out", tmp_path / "ABC", "--verbose")
    assert "layer 0 attn.value.out" in done.out
    composed, direct = (Alignment.from_pretrained(tmp_path / name) for name in ("ABC", "AC"))
    assert composed.maps.keys() == direct.maps.keys()
    assert all(torch.equal(composed.maps[pair].indices, direct.maps[pair].indices) for pair in direct.maps)
    assert len(composed.details["composed"]) == 2
    options = ["--alignment", tmp_path / "ABC", "--out", tmp_path / "graft"]
    command("transfer", tmp_path / "module", "--student", tmp_path / "C", *options)
    moved = PeftModel.from_pretrained(tiny.task_model(tmp_path / "C"), tmp_path / "graft").eval()
    batch = transformers.AutoTokenizer.from_pretrained(teacher)(tiny.sentences(4), padding=True, return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(moved(**batch).logits, adapted(**batch).logits, rtol=0, atol=1e-4)
    clash = command("compose", tmp_path / "BC", tmp_path / "AB", "--out", tmp_path / "x", code=1)
    assert "the student of the first is not the teacher of the second" in clash.err
