"""Verbs in surroundings that callers have changed, what they leave, and outputs that would cost what is not theirs."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

import peft_graft
import tiny
from peft_graft.errors import OutputError
from peft_graft.graft import Graft

OPTIONS = {"method": "prune-align", "max_tokens": 500, "polish": 4}


def moved(world: Path, **more: object) -> Graft:
    return tiny.transfer(world / "lora", world / "shallow", text=tiny.sentences(120), **OPTIONS, **more)


def test_random_numbers_are_as_if_nothing_had_been_called(world: Path) -> None:
    def drawn(*, between: bool) -> torch.Tensor:
        torch.manual_seed(7)
        if between:
            moved(world)
        return torch.randn(8)

    assert torch.equal(drawn(between=True), drawn(between=False))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off(world: Path, off: type[AbstractContextManager]) -> None:
    expected = moved(world).raw.digest
    with off():
        found = moved(world)
        assert not torch.is_grad_enabled()
    assert found.raw.digest == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_may_be_the_default(world: Path, dtype: torch.dtype) -> None:
    expected, before = moved(world).raw.digest, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = moved(world)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)
    assert found.raw.digest == expected


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(world: Path, tmp_path: Path) -> Path:
    """A folder with a module, its student and a text, as people have them."""
    folder = tmp_path / "project"
    shutil.copytree(world / "lora", folder / "lora")
    shutil.copytree(world / "shallow", folder / "student")
    (folder / "text.txt").write_text("\n".join(tiny.sentences(120)))
    return folder


@pytest.mark.parametrize("out", ["student", "lora", ".", "link"])
def test_what_a_run_reads_is_never_replaced(world: Path, project: Path, out: str) -> None:
    (project / "link").symlink_to(project / "student")
    for name in (".", "student", "lora"):
        (project / name / "graft.json").write_text("{}")  # as if they were of this package's making
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="what the run reads"):
        tiny.transfer(
            project / "lora", project / "student", teacher=world / "teacher", text=project / "text.txt",
            out=project / out, force=True, **OPTIONS,
        )  # fmt: skip
    with pytest.raises(OutputError, match="what the run reads"):
        tiny.align(
            world / "teacher", project / "student", text=project / "text.txt", out=project / "student", force=True
        )
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_a_folder_of_other_things_is_not_replaced(world: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    moved(world, out=tmp_path / "notes", force=True)  # it was empty
    moved(world, out=tmp_path / "notes", force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"other things in it, which would be lost.*one of graft\.json"):
        moved(world, out=tmp_path / "mine", force=True)
    found = tiny.align(world / "teacher", world / "shallow", text=tiny.sentences(120), max_tokens=500)
    for thing in (moved(world), found):
        with pytest.raises(OutputError, match="other things in it, which would be lost"):
            thing.save_pretrained(tmp_path / "mine", force=True)
    (tmp_path / "mine").rename(tmp_path / "lora")
    shelf = peft_graft.transfer_all([world / "lora"], world / "shallow", out=tmp_path, config={"force": True})
    assert "other things in it, which would be lost" in shelf.modules[0].error
    assert (tmp_path / "lora" / "thesis.tex").exists()


def test_what_a_link_leads_to_is_replaced_and_not_the_link(world: Path, tmp_path: Path) -> None:
    """As outputs lie on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "graft")
    for _ in range(2):
        moved(world, out=tmp_path / "out", force=True)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "graft" / "graft.json").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["graft"]


def test_a_graft_is_no_shelf_and_is_not_exported_onto_itself(world: Path, tmp_path: Path) -> None:
    moved(world, out=tmp_path / "graft")
    page = (tmp_path / "graft" / "report.html").read_text()
    with pytest.raises(OutputError, match="is a graft, and no shelf of them"):
        peft_graft.transfer_all([world / "lora"], world / "shallow", out=tmp_path / "graft", config={"force": True})
    with pytest.raises(OutputError, match="is what the run reads"):
        peft_graft.export(tmp_path / "graft", to="peft", out=tmp_path / "graft", config={"force": True})
    assert (tmp_path / "graft" / "report.html").read_text() == page
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "report.html").write_text("mine")
    with pytest.raises(OutputError, match=r"has a report\.html of something else"):
        peft_graft.transfer_all([world / "lora"], world / "shallow", out=tmp_path / "site")


def test_folders_are_as_open_as_other_new_ones(world: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    moved(world, out=tmp_path / "graft")
    assert (tmp_path / "graft").stat().st_mode == (tmp_path / "plain").stat().st_mode
