"""Where models are, what the hub calls them, and what a configuration for them says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

import tiny
from peft_graft.checkpoints.student_names import written_names
from peft_graft.models.loading import Loading, blank_handle, wrap_model
from peft_graft.models.places import hub_id_of, place_of
from peft_graft.models.tasks import Task


def test_a_folder_has_an_absolute_path_and_a_hub_id_stays(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert place_of("base") == place_of("./base/") == str(tmp_path / "base")
    assert place_of("org/base") == "org/base"
    assert place_of("") == ""


@pytest.mark.parametrize(
    ("saved_from", "known"),
    [
        ("org/base", "org/base"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("/home/me/base", None),
        ("./base", None),
        ("out/runs/base", None),
        ("org/x\n---\nlicense: mit", None),
        ("here", None),
        ("", None),
        (["org/base"], None),
    ],
)
def test_the_hub_id_of_a_folder(saved_from: object, known: str | None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text(json.dumps({"_name_or_path": saved_from}))
    assert hub_id_of("here") == known


def test_the_hub_id_of_other_names(tmp_path: Path) -> None:
    cached = tmp_path / "models--org--some-base" / "snapshots" / ("0" * 40)
    cached.mkdir(parents=True)
    assert hub_id_of(str(cached)) == "org/some-base"
    assert hub_id_of("org/base") == "org/base"
    assert hub_id_of("/gone/base") is None
    (tmp_path / "config.json").write_text("[")
    assert hub_id_of(str(tmp_path)) is None


def test_a_configuration_names_the_student_and_its_revision() -> None:
    handle = blank_handle(tiny.config(layers=1, hidden=16), "org/base")
    handle.loading = Loading(revision="v2")
    names = written_names(handle, Task.BASE)
    assert (names.name, names.revision) == ("org/base", "v2")
    live = wrap_model(transformers.AutoModel.from_config(tiny.config(layers=1, hidden=16)))
    assert live.record.hub_id is None
    record = live.record.model_copy(update={"name": "/gone/base"})
    assert record.reachable == "/gone/base"
    assert record.model_copy(update={"hub_id": "org/base"}).reachable == "org/base"
