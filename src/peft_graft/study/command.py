"""``peft-graft study``: from the file to the tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_graft.config import StudyConfig
from peft_graft.errors import StudyError
from peft_graft.outputs import reserved
from peft_graft.run import Callback
from peft_graft.study.cell import Cell
from peft_graft.study.folder import StudyFolder
from peft_graft.study.grids import cells_of
from peft_graft.study.results import export
from peft_graft.study.runner import Here, OnRay, Outcome, estimate, run_study
from peft_graft.study.spec import Study, paper_study, read_study
from peft_graft.study.tables import ResultTable, grid_of, write_tables

PAPER = ("matching", "incompatible")


def study(
    file: Path | None,
    *,
    paper: str | None = None,
    out: Path | None = None,
    changes: Sequence[str] = (),
    config: StudyConfig | None = None,
    dry_run: bool = False,
    callbacks: Sequence[Callback] = (),
    console: Console,
) -> int:
    """Run a study and print its tables; the number of cells that failed or could not be tried.

    Raises:
        StudyError: not exactly one of ``file`` and ``paper``, or a study that cannot be.
        OutputError: results cannot be written.
    """
    if (file is None) == (paper is None) or (paper is not None and paper not in PAPER):
        raise StudyError("give a study file, or --paper matching or --paper incompatible", found=paper)
    config = config or StudyConfig()
    declared = read_study(file if file is not None else paper_study(str(paper)), changes)
    path = out or Path("out") / declared.name
    folder, cells = StudyFolder(path), cells_of(declared, config.only)
    if dry_run:
        _show_plan(cells, folder, console)
        return 0
    if config.export:
        with reserved(Path(config.export)):  # one that cannot be written says so before all the work
            pass
    executor = OnRay(path, config.ray, config.cpus, config.gpus) if config.ray else Here(path, callbacks)
    outcome = run_study(declared, path, executor, only=config.only, callbacks=callbacks)
    records = folder.records(cells_of(declared))
    show_tables(write_tables(records, path / "tables"), console)
    _show_outcome(outcome, declared, folder, console)
    if config.export:
        added = export(records, Path(config.export), study=declared.name)
        console.print(f"{added} new rows in {config.export}", soft_wrap=True)
    return len(outcome.failed) + len(outcome.blocked)


def _show_plan(cells: Mapping[str, Cell], folder: StudyFolder, console: Console) -> None:
    for name in cells:
        console.print(("done    " if folder.is_done(name) else "to do   ") + name, soft_wrap=True, markup=False)
    left, seconds = estimate(cells, folder)
    console.print(f"{len(cells)} cells, {len(cells) - sum(left.values())} done")
    for kind, count in left.items():
        console.print(f"  {count:5} {kind}")
    if not left:
        return
    if seconds is None:
        console.print("no estimate yet: it needs a finished cell of every kind")
    else:
        console.print(f"about {seconds / 3600:.1f} hours, one cell after another")


def show_tables(tables: Sequence[ResultTable], console: Console) -> None:
    """Print tables, a column for every language, or a row where the terminal is too narrow for that."""
    for found in tables:
        header, lines = grid_of(found)
        grid = [header, *lines]
        table = _table(found.title, grid)
        if console.measure(table, options=console.options.update_width(10_000)).maximum > console.width:
            table = _table(found.title, list(zip(*grid, strict=True)))
        console.print(table)


def _table(title: str, grid: Sequence[Sequence[str]]) -> Table:
    table = Table(*map(escape, grid[0]), title=escape(title))
    for line in grid[1:]:
        table.add_row(*map(escape, line))
    return table


def _show_outcome(outcome: Outcome, declared: Study, folder: StudyFolder, console: Console) -> None:
    for name in outcome.failed:
        console.print(f"[red]failed[/]  {name}: ", end="")
        console.print(folder.error(name), markup=False, soft_wrap=True)
    for name in outcome.blocked:
        console.print(f"[yellow]blocked[/] {name}: a cell that it needs has failed", soft_wrap=True)
    console.print(
        f"{declared.name}: {len(outcome.done)} cells done, {len(outcome.failed)} failed, "
        f"{len(outcome.blocked)} blocked; tables and curves in {folder.path / 'tables'}",
        soft_wrap=True,
    )
