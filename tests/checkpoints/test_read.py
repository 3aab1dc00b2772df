"""Where checkpoints are found: folders, sub-folders and the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import tiny
from peft_graft.checkpoints.read import locate, read_checkpoint
from peft_graft.errors import CheckpointError


def test_a_folder_and_a_folder_in_it(tmp_path: Path) -> None:
    tiny.peft_lora(tmp_path / "many" / "ner", tiny.base_model(tmp_path / "base", layers=2))
    assert locate(tmp_path / "many") == tmp_path / "many"
    assert read_checkpoint(locate(tmp_path / "many", subfolder="ner")).kind == "lora"
    with pytest.raises(CheckpointError, match="no such sub-folder; found pos"):
        locate(tmp_path / "many", subfolder="pos")
    with pytest.raises(CheckpointError, match="give one of its sub-folders: ner"):
        read_checkpoint(tmp_path / "many")


def test_the_hub_is_asked_for_what_belongs_to_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        (tmp_path / "snapshot" / "ner").mkdir(parents=True)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = locate("someone/modules", revision="v2", subfolder="ner", token="secret")
    assert found == tmp_path / "snapshot" / "ner"
    assert (asked["name"], asked["revision"], asked["token"]) == ("someone/modules", "v2", "secret")
    assert set(asked["allow_patterns"]) == {
        "ner/*.json",
        "ner/adapter*",
        "ner/pytorch_*",
        "ner/model_head*",
        "ner/value_head*",
    }
