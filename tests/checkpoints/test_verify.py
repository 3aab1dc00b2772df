"""What is said of a written checkpoint that does not load, or does nothing, without its temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from conftest import needs_adapters
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.student_names import written_names
from peft_graft.checkpoints.verify import verify
from peft_graft.errors import VerificationError
from peft_graft.models.loading import ModelHandle, load_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def changed(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    """Change the tensors of the weights file, or leave out those that become None."""
    file = folder / "adapter_model.safetensors"
    found = {key: change(key, value) for key, value in load_file(file).items()}
    save_file({key: value for key, value in found.items() if value is not None}, file)


def configured(folder: Path, **settings: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor is gone": (
        lambda folder: changed(folder, lambda key, value: None if "layer.0" in key else value),
        "keys are missing or unexpected on loading; found not loaded [], not written [",
    ),
    "it does nothing": (
        lambda folder: changed(folder, lambda key, value: value * 0 if "lora_B" in key else value),
        "the module loads but changes nothing in the student's output. Fix: check that the teacher's module was",
    ),
    "it is not finite": (
        lambda folder: changed(folder, lambda key, value: value * 1e38 if "lora" in key else value),
        "the student's output with the module is not finite",
    ),
    "another rank": (lambda folder: configured(folder, r=3), "peft cannot load it (Error(s) in loading state_dict"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "what was written cannot be read (the weights file is missing)",
    ),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "peft cannot load it ("),
    "torn weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"torn"),
        "what was written cannot be read (the weights cannot be read: the file is truncated, corrupt or not",
    ),
}


def refused(folder: Path, raw: RawCheckpoint, student: ModelHandle, message: str) -> None:
    with pytest.raises(VerificationError) as caught:
        verify(folder, raw, student)
    assert str(caught.value).startswith(f"{student.name}: {message}")
    assert str(folder) not in str(caught.value)


@pytest.fixture(scope="module")
def student(world: Path) -> ModelHandle:
    return load_model(str(world / "teacher"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_folder_is_not_named(damage: str, world: Path, student: ModelHandle, tmp_path: Path) -> None:
    raw = read_checkpoint(world / "lora")
    write_checkpoint(tmp_path, raw, written_names(student, raw.task))
    damaging, message = DAMAGES[damage]
    damaging(tmp_path)
    refused(tmp_path, raw, student, message)


@needs_adapters
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_adapter.bin", "what was written cannot be read ("),
        ("adapter_config.json", "adapters cannot load it ("),
    ],
)
def test_nor_with_the_other_library(file: str, message: str, world: Path, student: ModelHandle, tmp_path: Path) -> None:
    raw = read_checkpoint(world / "pfeiffer")
    write_checkpoint(tmp_path, raw, written_names(student, raw.task))
    (tmp_path / file).unlink()
    refused(tmp_path, raw, student, message)


def test_a_transfer_leaves_no_trace_of_it(world: Path, tmp_path: Path) -> None:
    tiny.peft_lora(tmp_path / "idle", world / "teacher")
    changed(tmp_path / "idle", lambda key, value: value * 0 if "lora_B" in key else value)
    with pytest.raises(VerificationError) as caught:
        tiny.transfer(tmp_path / "idle", world / "shallow", method="copy", out=tmp_path / "graft")
    assert "partial" not in str(caught.value)
    assert str(caught.value).startswith(f"{world / 'shallow'}: the module loads but changes nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["idle"]
