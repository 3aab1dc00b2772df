"""Progress: one bar, plain lines where there is no terminal, nothing with --quiet."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from peft_graft.cli.output import look
from peft_graft.cli.progress import EVERY, Bar, Lines, PlannedBar, watching
from peft_graft.outlook import StudentSummary


def test_lines_come_now_and_then_with_step_and_loss() -> None:
    now, said = [0.0], io.StringIO()
    lines = Lines(Console(file=said), stages=False, clock=lambda: now[0])
    lines.on_stage_begin("polishing")
    lines.on_progress("polishing", 1, 100)
    lines.on_loss("polishing", 0.5)
    assert said.getvalue() == ""
    now[0] = EVERY
    lines.on_progress("polishing", 40, 100)
    lines.on_progress("polishing", 41, 100)
    assert said.getvalue() == "polishing 40/100, loss 0.500\n"


def test_stages_are_named_once_and_without_codes() -> None:
    said = io.StringIO()
    lines = Lines(Console(file=said), stages=True)
    for stage in ("one", "one", "[bold]two[/]"):
        lines.on_stage_begin(stage)
    assert said.getvalue() == "one\n[bold]two[/]\n"


def test_one_bar_shows_stage_steps_loss_and_time_left(monkeypatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    fields = TextColumn("{task.description}|{task.completed}|{task.fields[loss]}|{task.fields[left]}")
    with Progress(fields, console=console) as display:
        bar = Bar(display)
        bar.started -= 10
        bar.on_stage_begin("aligning the models")
        bar.on_stage_begin("polishing")
        bar.started -= 10
        bar.on_progress("polishing", 50, 100)
        bar.on_loss("polishing", 0.25)
        bar.on_progress("polishing", 51, 100)
        (task,) = display.tasks
        assert (task.description, task.completed, task.total) == ("polishing", 51, 100)
        assert task.fields["loss"] == "loss 0.250"
        assert task.fields["left"].endswith(" left")
        bar.on_stage_begin("judging")
        assert task.fields["loss"] == ""


@contextmanager
def planned_bar() -> Iterator[tuple[PlannedBar, Callable[[], str]]]:
    """A bar of a run that began 100 s ago, and what it says of the whole run."""
    with Progress(TextColumn("{task.fields[whole]}"), console=Console(file=io.StringIO(), width=80)) as display:
        bar = PlannedBar(display)
        bar.begun -= 100

        def whole() -> str:
            (task,) = display.tasks
            return str(task.fields["whole"])

        yield bar, whole


def test_a_planned_bar_tells_the_time_left_of_the_whole_run() -> None:
    with planned_bar() as (bar, whole):
        seconds = {"making prompts": 9.0, "asking the teacher": 2.0, "polishing": 3.0}
        bar.on_plan(StudentSummary(name="s", stage_seconds=seconds))
        bar.on_stage_begin("loading models")
        bar.on_stage_begin("asking the teacher")  # the prompts were made before an interruption
        bar.started -= 10
        bar.on_progress("asking the teacher", 50, 100)
        assert whole() == "2 min, about 40 s left in all", "10 s to the end of the stage, and 30 s, ten times the least"
        bar.on_stage_end("asking the teacher", 20)
        bar.on_stage_begin("judging")
        bar.on_progress("judging", 1, 2)
        assert whole() == "2 min, about 30 s left in all"
        bar.on_stage_begin("polishing")
        bar.on_progress("polishing", 1, 2)
        assert whole() == "2 min", "the stage that runs is the last long one, and has its own time left"


def test_a_stage_that_comes_in_rounds_is_over_with_the_last() -> None:
    with planned_bar() as (bar, whole):
        seconds = {"aligning the models": 4.0, "fitting": 6.0, "polishing": 10.0}
        bar.on_plan(StudentSummary(name="s", stage_seconds=seconds, stage_rounds={"fitting": 3}))
        bar.on_stage_begin("fitting")
        bar.on_stage_end("fitting", 4)
        bar.on_stage_begin("aligning the models")
        bar.started -= 4
        bar.on_progress("aligning the models", 1, 2)
        assert whole() == "2 min, about 32 s left in all", "4 s of this stage, and twice two rounds of 2 s and 10 s"
        bar.on_stage_begin("polishing")
        assert whole() == "2 min", "a round that never came is not waited for"


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_watches_nothing(monkeypatch, quiet: bool) -> None:
    monkeypatch.setattr(look, "quiet", quiet)
    with watching(lines=True) as callbacks:
        assert len(callbacks) == (0 if quiet else 1)
