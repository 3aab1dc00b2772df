"""Alignments say which text they were made from, so that a verdict by the same text says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from peft_graft import Alignment
from peft_graft.alignment.alignment import copy_alignment
from peft_graft.alignment.distinct import key_of

OLD, NEW = tiny.sentences(150, seed=1), tiny.sentences(150, seed=2)
UNKNOWN = "the alignment does not say which text it was made from"


@pytest.fixture(scope="module")
def made(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "old.txt").write_text("\n".join(OLD))
    tiny.align(world / "teacher", world / "shallow", text=folder / "old.txt", out=folder / "alignment")
    return folder / "alignment"


def test_what_was_read_is_kept_and_read_back(made: Path) -> None:
    assert Alignment.from_pretrained(made).seen == frozenset(map(key_of, OLD))
    assert key_of("Lisbon, river!") == key_of("lisbon river") < 2**63


def test_a_verdict_by_the_same_text_says_so(made: Path, world: Path) -> None:
    graft = tiny.transfer(world / "lora", world / "shallow", alignment=made, text=OLD[:80], polish=0)
    (note,) = [note for note in graft.report.notes if note.startswith("the alignment")]
    assert note.startswith("the alignment was made from text that has ")
    assert note.endswith(" samples that judge the graft in it, which may flatter the verdict; give other text")
    assert Alignment.from_pretrained(made).remark([[line] for line in NEW]) is None


def test_an_alignment_of_an_earlier_version_cannot_exclude_it(made: Path, tmp_path: Path) -> None:
    Alignment.from_pretrained(made).save_pretrained(tmp_path / "earlier")
    path = tmp_path / "earlier" / "alignment.safetensors"
    tensors = load_file(path)
    del tensors["text"]
    save_file(tensors, path)
    earlier = Alignment.from_pretrained(tmp_path / "earlier")
    assert earlier.seen is None
    assert earlier.remark([["some text"]]).startswith(UNKNOWN)
    assert earlier.remark([]) is None, "nothing judges"


def test_what_is_no_list_of_texts_is_not_known(made: Path, tmp_path: Path) -> None:
    Alignment.from_pretrained(made).save_pretrained(tmp_path / "odd")
    path = tmp_path / "odd" / "alignment.safetensors"
    save_file({**load_file(path), "text": torch.ones(2, 2)}, path)
    assert Alignment.from_pretrained(tmp_path / "odd").seen is None


def test_maps_that_no_text_made_have_seen_none() -> None:
    assert copy_alignment({}, "", "").remark([["some text"]]) is None


def test_pairs_count_where_both_texts_were_read(made: Path) -> None:
    alignment = replace(Alignment.from_pretrained(made), seen=frozenset(map(key_of, ["one", "two"])))
    assert alignment.remark([["one", "three"]]) is None
    assert "has 1 of the 2 samples" in alignment.remark([["one", "three"], ["two", "one"]])
