"""Progress in Python: shown where someone sees it, silent where that is asked for."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path

import huggingface_hub.utils
import pytest

import peft_graft
from peft_graft import Callback, ProgressCallback
from peft_graft.models.task_models import quiet_libraries
from peft_graft.progress import watchers
from peft_graft.run import Run


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(patch: pytest.MonkeyPatch) -> Terminal:
    """In a test's own body, for pytest gives every fixture and test its own standard error."""
    found = Terminal()
    patch.setattr(sys, "stderr", found)
    return found


def test_stages_and_their_progress_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    run = Run([ProgressCallback()])
    for total in (4, 6):  # a stage that comes again begins anew
        with run.stage("polishing"):
            for step in range(total + 1):
                run.progress("polishing", step, total)
    with run.stage("loading models"):
        pass
    shown = screen.getvalue()
    assert "polishing: 100%" in shown
    assert "| 4/4 [" in shown
    assert "| 6/6 [" in shown
    assert "loading models" in shown


def test_a_verb_shows_it_in_a_terminal_unless_told_otherwise(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    peft_graft.transfer(world / "lora", world / "shallow", config={"method": "copy"})
    assert "loading models" in screen.getvalue()
    seen = screen.getvalue()
    peft_graft.transfer(world / "lora", world / "shallow", config={"method": "copy"}, callbacks=[])
    assert screen.getvalue() == seen


def test_who_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch)
    own = Callback()
    assert watchers(own) == [own]
    assert watchers([own]) == [own]
    assert watchers([]) == []
    assert [type(one) for one in watchers(None)] == [ProgressCallback]
    huggingface_hub.utils.disable_progress_bars()
    try:
        assert watchers(None) == []
        with quiet_libraries():
            pass
        assert watchers(None) == [], "bars that were turned off are on again"
    finally:
        huggingface_hub.utils.enable_progress_bars()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert watchers(None) == []
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert [type(one) for one in watchers(None)] == [ProgressCallback]


def test_what_does_not_watch_is_named() -> None:
    with pytest.raises(peft_graft.GraftError) as caught:
        watchers([Callback(), print, Callback])  # type: ignore[list-item]
    assert str(caught.value) == (
        "callbacks: these do not watch a run; expected a list of peft_graft.Callback, "
        "found Callback, builtin_function_or_method, Callback"
    )
