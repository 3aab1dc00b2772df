"""``peft-graft study``: from the file to its results and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_graft.config import StudyConfig
from peft_graft.errors import StudyError
from peft_graft.outputs import reserved
from peft_graft.record import Record
from peft_graft.run import Callback
from peft_graft.study.folder import StudyFolder
from peft_graft.study.grids import cells_of
from peft_graft.study.read_study import paper_study, read_study
from peft_graft.study.results import export
from peft_graft.study.runner import Here, OnRay, estimate, run_study
from peft_graft.study.spec import Study
from peft_graft.study.tables import ResultTable, grid_of, write_tables

PAPER = ("matching", "incompatible")


class KindOfCells(Record):
    """Cells of one kind: how many there are, and how many of them are done."""

    kind: str
    cells: int
    done: int


class StudyPlan(Record):
    """What a study would do.

    ``seconds``: about what the cells that are left take, one after another; None before one of every kind is done.
    ``cells``: by id, whether each is done.
    """

    name: str
    out: str
    kinds: list[KindOfCells]
    seconds: float | None
    cells: dict[str, bool]


class StudyRun(Record):
    """What became of a study's cells.

    ``failed``: ids with their errors. ``blocked``: ids of those that need a cell that failed. ``tables``: the folder of
    tables and curves. ``exported``: rows that were new in the file of results, if one was asked for.
    """

    name: str
    out: str
    done: list[str]
    failed: dict[str, str]
    blocked: list[str]
    tables: str
    exported: int | None = None


def study(
    file: Path | None,
    *,
    paper: str | None = None,
    out: Path | None = None,
    changes: Sequence[str] = (),
    config: StudyConfig | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[StudyRun, list[ResultTable]]:
    """Run a study; what became of it, and its tables.

    Raises:
        StudyError: not exactly one of ``file`` and ``paper``, or a study that cannot be.
        OutputError: results cannot be written.
    """
    config = config or StudyConfig()
    declared, path = _declared(file, paper, out, changes)
    folder = StudyFolder(path)
    cells_of(declared, config.only)
    if config.export:
        with reserved(Path(config.export)):  # one that cannot be written says so before all the work
            pass
    executor = OnRay(path, config.ray, config.cpus, config.gpus) if config.ray else Here(path, callbacks)
    outcome = run_study(declared, path, executor, only=config.only, callbacks=callbacks)
    records = folder.records(cells_of(declared))
    tables = write_tables(records, path / "tables")
    found = StudyRun(
        name=declared.name,
        out=str(path),
        done=outcome.done,
        failed={name: folder.error(name) for name in outcome.failed},
        blocked=outcome.blocked,
        tables=str(path / "tables"),
        exported=export(records, Path(config.export), study=declared.name) if config.export else None,
    )
    return found, tables


def plan_study(
    file: Path | None,
    *,
    paper: str | None = None,
    out: Path | None = None,
    changes: Sequence[str] = (),
    config: StudyConfig | None = None,
) -> StudyPlan:
    """What ``study`` would do.

    Raises:
        StudyError: see ``study``.
    """
    declared, path = _declared(file, paper, out, changes)
    folder, cells = StudyFolder(path), cells_of(declared, (config or StudyConfig()).only)
    left, seconds = estimate(cells, folder)
    counts: dict[str, int] = {}
    for cell in cells.values():
        counts[cell.kind] = counts.get(cell.kind, 0) + 1
    return StudyPlan(
        name=declared.name,
        out=str(path),
        kinds=[KindOfCells(kind=kind, cells=n, done=n - left.get(kind, 0)) for kind, n in counts.items()],
        seconds=seconds,
        cells={name: folder.is_done(name) for name in cells},
    )


def _declared(file: Path | None, paper: str | None, out: Path | None, changes: Sequence[str]) -> tuple[Study, Path]:
    """The study that is meant, and its folder."""
    if (file is None) == (paper is None) or (paper is not None and paper not in PAPER):
        raise StudyError("give a study file, or --paper matching or --paper incompatible", found=paper)
    declared = read_study(file if file is not None else paper_study(str(paper)), changes)
    return declared, out or Path("out") / declared.name


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
