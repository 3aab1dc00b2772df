"""A module moved by one method."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from peft_graft.modules.lora import LoraModule


def test_the_strength_of_a_module_is_computed_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the whole update, so that once for every site of the student took minutes on models of many layers."""
    computed, strength = [], LoraModule.strength.fget
    monkeypatch.setattr(LoraModule, "strength", property(lambda module: computed.append(module) or strength(module)))
    graft = tiny.transfer(world / "lora", student=world / "teacher", method="copy")
    assert len(graft.report.sites) == 8
    assert len(computed) == 2 * 8  # the teacher's and the student's
