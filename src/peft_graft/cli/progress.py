"""Progress on standard error: one bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from peft_graft.cli.output import escaped, look
from peft_graft.cli.words import duration
from peft_graft.run import Callback

if TYPE_CHECKING:
    from rich.progress import Progress

    from peft_graft.record import Record

#: Seconds between two lines about the same stage.
EVERY = 30.0


class Stage(Callback):
    """The stage that runs now, how far it is, and what it has learned; others are told of every change.

    ``loss`` is None for a stage that does not train.
    """

    def __init__(self) -> None:
        self.name, self.done, self.total = "", 0, None
        self.loss: float | None = None
        self.begun = self.started = time.monotonic()

    name: str
    done: int
    total: int | None

    def on_stage_begin(self, stage: str) -> None:
        """Begin a stage, or go on with the one that runs."""
        self.on_progress(stage, 0, None)

    def on_progress(self, stage: str, done: int, total: int | None) -> None:
        """Note how far it is."""
        if stage != self.name:
            self.name, self.loss, self.started = stage, None, time.monotonic()
            self.new()
        self.done, self.total = done, total
        self.changed()

    def on_loss(self, stage: str, loss: float) -> None:
        """Note the loss."""
        self.loss = loss

    @property
    def left(self) -> str:
        """About how long the stage still takes, or nothing."""
        taken = time.monotonic() - self.started
        if not self.total or not self.done or self.done >= self.total or taken < 1:
            return ""
        return f"{duration(taken * (self.total - self.done) / self.done)} left"

    def new(self) -> None:
        """A stage has begun."""

    def changed(self) -> None:
        """It has come further."""


class Bar(Stage):
    """One bar for the whole run: the stage, its steps, loss and time left, and the time since the beginning."""

    def __init__(self, display: Progress) -> None:
        super().__init__()
        self._display = display
        self._task = display.add_task("planning", total=None, steps="", loss="", left="", whole="")

    def changed(self) -> None:
        """Move the bar."""
        self._display.update(
            self._task,
            description=escaped(self.name),
            completed=self.done,
            total=self.total,
            steps=f"{self.done:,}/{self.total:,}" if self.total else "",
            loss="" if self.loss is None else f"loss {self.loss:.3f}",
            left=self.left,
            whole=self.whole,
        )

    @property
    def whole(self) -> str:
        """How long the run has taken."""
        return duration(time.monotonic() - self.begun)


class PlannedBar(Bar):
    """The bar, and above it what the run will do; from that the time left of the run, while long stages are ahead.

    The plan has the least that a stage takes. Those so far tell how much more it is here.
    """

    def __init__(self, display: Progress) -> None:
        super().__init__(display)
        self._least: dict[str, float] = {}
        self._ahead: dict[str, int] = {}
        self._returning: set[str] = set()
        self._taken = self._least_so_far = 0.0

    def on_plan(self, plan: Record) -> None:
        """Print it."""
        from peft_graft.cli.display import planned
        from peft_graft.outlook import StudentSummary

        assert isinstance(plan, StudentSummary)
        self._display.console.print(planned(plan))
        self._ahead = {stage: plan.stage_rounds.get(stage, 1) for stage in plan.stage_seconds}
        self._returning = {stage for stage, rounds in self._ahead.items() if rounds > 1}
        self._least = {stage: seconds / self._ahead[stage] for stage, seconds in plan.stage_seconds.items()}

    def on_stage_begin(self, stage: str) -> None:
        """Begin a stage; those that were planned before it are over, or were not needed, unless it comes in rounds."""
        if stage in self._ahead and stage not in self._returning:
            planned = list(self._ahead)
            self._ahead = {later: self._ahead[later] for later in planned[planned.index(stage) + 1 :]}
        elif self._ahead.get(stage):
            self._ahead[stage] -= 1
        super().on_stage_begin(stage)

    def on_stage_end(self, stage: str, seconds: float) -> None:
        """Note how long a planned stage took."""
        if stage in self._least:
            self._taken, self._least_so_far = self._taken + seconds, self._least_so_far + self._least[stage]
            self.done, self.total = 0, None

    @property
    def whole(self) -> str:
        """How long the run has taken, and about how long it still takes."""
        share = self.done / self.total if self.total and self.name in self._least else 0.0
        here = time.monotonic() - self.started if share else 0.0
        least = self._least_so_far + share * self._least.get(self.name, 0.0)
        ahead = sum(self._least[stage] * rounds for stage, rounds in self._ahead.items())
        if not ahead or not least or self._taken + here < 1:
            return super().whole
        left = here * (1 - share) / share if share else 0.0
        left += (self._taken + here) / least * ahead
        return f"{super().whole}, about {duration(left)} left in all"


class Lines(Stage):
    """Lines where there is no terminal: one about a long stage now and then.

    Args:
        stages: whether every stage has a line when it begins. clock: seconds.
    """

    def __init__(self, console: Console, *, stages: bool, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._console, self._stages, self._clock, self._said = console, stages, clock, clock()

    def new(self) -> None:
        """Print the stage."""
        if self._stages:
            self._print(self.name)

    def changed(self) -> None:
        """Print how far it is, if it has been a while."""
        if self._clock() - self._said < EVERY or not self.done:
            return
        of = f"/{self.total:,}" if self.total else ""
        loss = "" if self.loss is None else f"loss {self.loss:.3f}"
        self._print(", ".join(part for part in (f"{self.name} {self.done:,}{of}", loss, self.left) if part))

    def _print(self, line: str) -> None:
        self._said = self._clock()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def watching(*, lines: bool = False, plan: bool = False) -> Iterator[list[Callback]]:
    """Callbacks that show progress on standard error, unless ``--quiet`` was given.

    Args:
        lines: where that is no terminal, whether every stage is named when it begins. plan: whether a terminal
            shows first what will be done and what it costs.
    """
    console = Console(stderr=True)
    if look.quiet:
        yield []
        return
    if not console.is_terminal:
        yield [Lines(console, stages=lines)]
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[steps]}"),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[left]}"),
        TextColumn("[dim]{task.fields[whole]}[/]"),
    )
    with Progress(*columns, console=console, transient=True) as display:
        yield [PlannedBar(display) if plan else Bar(display)]
