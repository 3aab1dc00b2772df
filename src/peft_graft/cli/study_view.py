"""What ``study`` would do, and what became of it, on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from peft_graft.cli.output import console_for_results, escaped
from peft_graft.cli.words import duration

if TYPE_CHECKING:
    from peft_graft.study.command import StudyPlan, StudyRun
    from peft_graft.study.tables import ResultTable


def show_plan(found: StudyPlan, *, ids: bool) -> None:
    """Cells by kind, and an estimate; every cell by its id where that is asked for."""
    console = console_for_results()
    if ids:
        for name, done in found.cells.items():
            console.print(("done    " if done else "to do   ") + escaped(name), soft_wrap=True)
    table = Table("cells", "in all", "done", "left")
    for kind in found.kinds:
        table.add_row(kind.kind, str(kind.cells), str(kind.done), str(kind.cells - kind.done))
    finished, count = sum(found.cells.values()), len(found.cells)
    table.add_section()
    table.add_row("all", str(count), str(finished), str(count - finished))
    console.print(table)
    if found.seconds is None:
        console.print("no estimate yet: it needs a finished cell of every kind")
    elif finished < count:
        console.print(f"about {duration(found.seconds)}, one cell after another")
    console.print(f"[bold]results[/] {escaped(found.out)}", soft_wrap=True)


def counted(found: StudyRun) -> str:
    """How many cells of a study became what."""
    return f"{found.name}: {len(found.done)} cells done, {len(found.failed)} failed, {len(found.blocked)} blocked"


def show_run(found: StudyRun, tables: Sequence[ResultTable], export: str | None) -> None:
    """The tables, what failed, and where all lies."""
    from peft_graft.study.command import show_tables

    console = console_for_results()
    show_tables(tables, console)
    for name, error in found.failed.items():
        console.print(f"[red]failed[/]  {escaped(name)}: {escaped(error)}", soft_wrap=True)
    for name in found.blocked:
        console.print(f"[yellow]blocked[/] {escaped(name)}: a cell that it needs has failed", soft_wrap=True)
    console.print(escaped(counted(found)), soft_wrap=True)
    console.print(f"[bold green]written[/] tables and curves in {escaped(shlex.quote(found.tables))}", soft_wrap=True)
    if export:
        console.print(f"{found.exported} new rows in {escaped(export)}", soft_wrap=True)
