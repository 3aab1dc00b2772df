"""What a transfer tells before it works is what ``inspect`` says."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import transformers
from rich.console import Console
from rich.progress import Progress

import peft_graft
from peft_graft.cli.progress import Bar, PlannedBar
from peft_graft.outlook import StudentSummary
from peft_graft.run import Run

OPTIONS = {"polish": 0, "method": "prune-align", "head": "drop"}


class Watching(peft_graft.Callback):
    """Notes plans and stages, in order."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def on_plan(self, plan: object) -> None:
        self.seen.append(plan)

    def on_stage_begin(self, stage: str) -> None:
        self.seen.append(stage)


def test_a_run_tells_its_plan_before_anything_is_loaded(world: Path) -> None:
    watching, text = Watching(), str(world / "text.txt")
    peft_graft.transfer(world / "lora", world / "shallow", text=text, config=OPTIONS, callbacks=[watching])
    plan = watching.seen[0]
    assert watching.seen[1] == "loading models"
    assert isinstance(plan, StudentSummary)
    assert plan == peft_graft.inspect(world / "lora", world / "shallow", text=text, config=OPTIONS).student
    assert plan.text_tokens
    assert plan.weights_mib > 0
    stages = ["asking the teacher", "aligning the models", "comparing methods"]
    assert list(plan.stage_seconds) == stages, "nothing is polished"
    assert plan.stage_rounds == {"comparing methods": 2}
    assert sum(plan.stage_seconds.values()) == pytest.approx(plan.least_seconds, abs=1e-3)


def test_a_terminal_shows_the_plan_first() -> None:
    said = io.StringIO()
    with Progress(console=Console(file=said, force_terminal=True, width=80)) as display:
        plan = StudentSummary(
            name="s", layers=[[0], [2]], modules=4, method="copy", weights_mib=90.0, least_seconds=8.0
        )
        PlannedBar(display).on_plan(plan)
        Bar(display).on_plan(plan)
    assert said.getvalue().count("0 → 0, 2 → 1") == 1
    assert "90 MiB of weights in float32; 50,000 tokens take at" in said.getvalue()


def test_no_plan_is_made_where_nobody_asks_for_it() -> None:
    made: list[str] = []

    def make() -> StudentSummary:
        made.append("plan")
        return StudentSummary(name="s")

    Run([peft_graft.Callback()]).planned(make)
    assert made == []
    Run([peft_graft.Callback(), Watching(), Watching()]).planned(make)
    assert made == ["plan"]


def test_a_student_that_cannot_receive_it_is_still_described(world: Path) -> None:
    found = peft_graft.inspect(world / "lora", world / "shallow", config={"layers": "0,9"}).student
    assert found is not None
    assert found.problem
    assert (found.model_type, found.num_layers) == ("bert", 2)


def test_a_tokenizer_is_read_once_to_plan(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    whole = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda name, **options: read.append(name) or whole(name, **options),
    )
    peft_graft.inspect(world / "lora", world / "shallow", text=str(world / "text.txt"), config=OPTIONS)
    assert sorted(read) == [str(world / "shallow"), str(world / "teacher")]
