"""Progress in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from peft_graft.run import Callback


class Bars(Callback):
    """A bar for the stage that runs now."""

    def __init__(self, display: Progress) -> None:
        self._display = display
        self._tasks: dict[str, TaskID] = {}

    def on_stage_begin(self, stage: str) -> None:
        """Show the stage."""
        self.on_progress(stage, 0, None)

    def on_progress(self, stage: str, done: int, total: int | None) -> None:
        """Move the stage's bar."""
        if stage not in self._tasks:
            for finished in self._tasks.values():
                self._display.update(finished, visible=False)
            self._tasks[stage] = self._display.add_task(stage, total=total)
        self._display.update(self._tasks[stage], completed=done, total=total)


@contextmanager
def watching() -> Iterator[list[Callback]]:
    """Callbacks that show progress on standard error; none where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield []
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as display:
        yield [Bars(display)]
