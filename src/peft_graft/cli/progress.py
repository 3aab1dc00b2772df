"""Progress in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from peft_graft.run import Callback

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


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


class Lines(Callback):
    """A line for every stage when it begins, where there is no terminal for bars."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, ""

    def on_stage_begin(self, stage: str) -> None:
        """Print the stage, once where it comes several times in a row."""
        if stage != self._last:
            self._console.print(stage, markup=False, highlight=False, soft_wrap=True)
        self._last = stage


@contextmanager
def watching(*, lines: bool = False) -> Iterator[list[Callback]]:
    """Callbacks that show progress on standard error; where that is no terminal none, or ``lines``."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield [Lines(console)] if lines else []
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

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
