"""Classifiers of whole texts, of which there are fewer than the head's space has units."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from peft_graft.errors import PairingError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("few")
    tiny.base_model(root / "teacher", hidden=96)
    tiny.base_model(root / "student", hidden=96, layers=2, seed=5)
    tiny.peft_lora(root / "lora", root / "teacher", task="sequence-classification", labels=("a", "b", "c"))
    return root


def test_a_head_that_is_fitted_needs_no_more_texts_than_the_polish(world: Path, tmp_path: Path) -> None:
    text = tiny.sentences(90)
    graft = tiny.transfer(world / "lora", world / "student", text=text, out=tmp_path / "graft")
    assert graft.report.head.how == "fitted"
    assert graft.report.verdict.level is not None
    tried = set(graft.report.tried)
    assert {"prune-align, as moved", "ridge, head fitted", "procrustes, head fitted"} <= tried
    fitted = tiny.transfer(world / "lora", world / "student", text=text, method="ridge", head="fit")
    assert fitted.report.head.how == "fitted"


@pytest.mark.parametrize("options", [{"head": "carry"}, {"head": "carry", "method": "ridge"}])
def test_one_that_is_only_carried_needs_as_many_as_it_has_units(world: Path, options: dict[str, str]) -> None:
    message = "first.out: too few samples for the dimension; expected at least 96"
    with pytest.raises(PairingError, match=message):
        tiny.transfer(world / "lora", world / "student", text=tiny.sentences(90), **options)


def test_so_does_one_whose_teacher_cannot_be_asked(world: Path) -> None:
    """Of so few texts none are left to fit it by."""
    with pytest.raises(PairingError, match="too few samples for the dimension"):
        tiny.transfer(world / "lora", world / "student", text=tiny.sentences(45), method="ridge")
