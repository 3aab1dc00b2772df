"""What the teacher is asked about: no more text than is learned from, chosen by or judged by."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny

HELD_OUT = 80  # of 400 sentences


def asked(module: Path, world: Path, **how) -> set[int]:
    """The numbers of texts that teachers were asked about."""
    found = set()
    tiny.transfer(
        module, student=world / "shallow", text=tiny.sentences(400), max_tokens=300,
        progress=lambda stage, done, total: found.add(total) if stage == "asking the teacher" else None, **how,
    )  # fmt: skip
    return found


@pytest.mark.parametrize("polish", [0, 2])
def test_where_no_head_is_fitted_the_teacher_says_what_is_polished_on(world: Path, polish: int, tmp_path: Path) -> None:
    tiny.peft_lora(tmp_path / "module", world / "teacher", task="base")
    assert asked(tmp_path / "module", world, method="prune-align", polish=polish) == {HELD_OUT + 32 * polish}


def test_layers_are_fitted_where_the_head_is_left_behind_too(world: Path) -> None:
    assert asked(world / "lora", world, method="functional", polish=0, head="drop") == {400}
