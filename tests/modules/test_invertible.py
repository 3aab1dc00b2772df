"""Adapters with an invertible part: copied where the embeddings are the teacher's, refused by name elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from conftest import needs_adapters
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.errors import AlignmentError, CheckpointError, PlanError
from peft_graft.files import read_tensors, write_tensors
from peft_graft.models.loading import load_model
from peft_graft.models.spaces import Site

pytestmark = needs_adapters
INVERTIBLE = Site(-1, "embed.invertible")


@pytest.fixture
def language(world, tmp_path) -> Path:
    """A language adapter of MAD-X's configuration."""
    tiny.adapterhub_module(tmp_path / "language", world / "teacher", "seq_bn_inv", head=None)
    return tmp_path / "language"


def hidden(base: Path, module: Path) -> torch.Tensor:
    import adapters

    model = adapters.AutoAdapterModel.from_pretrained(base)
    model.load_adapter(str(module), set_active=True)
    ids = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.eval()(input_ids=ids).last_hidden_state


def test_it_returns_to_its_own_model_as_it_was(language, world, tmp_path) -> None:
    graft = tiny.transfer(language, student=world / "teacher", text=tiny.sentences(100), out=tmp_path / "same")
    assert graft.report.method == "copy"
    assert graft.report.verdict.measured.divergence == pytest.approx(0, abs=1e-9)
    before, after = (read_tensors(folder / "pytorch_adapter.bin") for folder in (language, tmp_path / "same"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_to_a_shallower_student_with_the_same_embeddings(language, world, tmp_path) -> None:
    graft = tiny.transfer(language, student=world / "shallow", method="copy", out=tmp_path / "g")
    assert graft.report.verification.done
    original = read_checkpoint(language)
    written = read_checkpoint(tmp_path / "g")
    path = "bert.invertible_adapters"
    assert written.parts[path] == original.parts[path]
    assert next(site for site in graft.report.sites if site.site == "embed.invertible").share > 0
    bare = tiny.transfer(language, student=world / "shallow", method="copy", sites=["*.adapter"], out=tmp_path / "b")
    assert INVERTIBLE not in bare.checkpoint.modules
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["config"]["inv_adapter"] is None
    alone = tiny.transfer(language, student=world / "shallow", method="copy", sites=["embed.*"], out=tmp_path / "a")
    assert list(alone.checkpoint.modules) == [INVERTIBLE]
    assert alone.report.verification.done
    assert not torch.allclose(hidden(world / "shallow", tmp_path / "g"), hidden(world / "shallow", tmp_path / "b"))


def test_it_runs_here_as_in_its_library(language, world) -> None:
    attached = attach(read_checkpoint(language), load_model(str(world / "teacher")))
    ids = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(attached.forward({"input_ids": ids})[1], hidden(world / "teacher", language))


def test_elsewhere_it_is_refused_and_the_rest_moves(language, world, tmp_path) -> None:
    student = tiny.base_model(tmp_path / "other", "bert", layers=2, hidden=32, seed=9)
    with pytest.raises(AlignmentError, match="can only be copied.*--sites"):
        tiny.transfer(language, student=student, method="prune-align", text=world / "text.txt")
    with pytest.raises(PlanError, match="embed.invertible: .*expected 32 units in the student, found 24"):
        tiny.transfer(language, student=world / "narrow", text=world / "text.txt")
    graft = tiny.transfer(
        language, student=world / "narrow", text=tiny.sentences(100), sites=["*.adapter"], polish=0, out=tmp_path / "g"
    )
    assert graft.report.verification.done


def test_a_damaged_one_is_refused(language, world, tmp_path) -> None:
    file = language / "pytorch_adapter.bin"
    tensors = read_tensors(file)
    gone = next(key for key in tensors if "invertible" in key and key.endswith("2.bias"))
    write_tensors(file, {key: value for key, value in tensors.items() if key != gone})
    with pytest.raises(CheckpointError, match="invertible part is not complete"):
        tiny.transfer(language, student=world / "shallow", method="copy")
