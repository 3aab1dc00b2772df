"""The page of a study: scores, lift, curves, languages, significance, and the cells that failed, in one HTML file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_graft.errors import StudyError
from peft_graft.page import figures
from peft_graft.page.pictures import Picture, bars, curves, heat_map
from peft_graft.page.render import render
from peft_graft.study.folder import StudyFolder
from peft_graft.study.lift import cells_of, lifts_of, summary
from peft_graft.study.results import Record, read_results
from peft_graft.study.tables import ResultTable, curve_panels, grid_of, result_tables

#: Starts that are drawn as bars beside each other, at most.
_MOST_BARS = 8
#: Seconds after which a page that is served is asked for again.
_REFRESH = 10


@dataclass(frozen=True)
class StudyResults:
    """What is there of a study: its name, records of finished cells, and errors of those that failed, by id."""

    name: str
    records: Sequence[Record]
    failures: dict[str, str]

    @classmethod
    def read(cls, place: Path) -> StudyResults:
        """The results in a study's folder, or in a file that ``peft-graft study --export`` wrote.

        Raises:
            StudyError: there are none.
        """
        if place.is_file():
            return cls(place.stem, read_results(place), {})
        folder = StudyFolder(place)
        if not (place / "study.json").is_file():
            raise StudyError("the folder holds no study", where=str(place), expected="study.json")
        failures = {name: folder.error(name) for name in folder.failed}
        return cls(folder.name, folder.records(folder.finished), failures)


def study_page(results: StudyResults, *, live: bool = False) -> str:
    """One HTML file with all that is known so far.

    Args:
        live: whether the page asks for itself again, to show a study that is running.
    """
    tables = result_tables(results.records)
    return render(
        "study.html.jinja",
        title=f"{results.name} · study report",
        name=results.name,
        refresh=_REFRESH if live else None,
        facts=_facts(results),
        **_lift(results.records),
        tables=[_table(found) for found in tables],
        scores=_scores(tables),
        languages=_languages(tables),
        curves=_curves(results.records),
        failures=sorted(results.failures.items()),
    )


def _facts(results: StudyResults) -> list[dict[str, str]]:
    kinds = Counter(record["kind"] for record in results.records)
    seconds = sum(float(record.get("seconds") or 0) for record in results.records)
    found = [
        figures.fact(
            "cells finished",
            f"{len(results.records):,}",
            ", ".join(f"{count} of kind {kind}" for kind, count in kinds.items()),
        ),
        figures.fact(
            "cells that failed",
            f"{len(results.failures):,}",
            "listed below with their errors" if results.failures else "none",
        ),
    ]
    if seconds:
        found.append(figures.fact("machine time", f"{seconds / 3600:.1f} h", "over all finished cells"))
    return found


def _lift(records: Sequence[Record]) -> dict[str, Any]:
    """Lift of language models' grafts; nothing where the study has not what it is compared with, or not yet."""
    generated = any(record["kind"] == "graft" and record["result"]["verdict"].get("generated") for record in records)
    try:
        found = cells_of(records) if generated else []
    except StudyError:
        found = []
    if not found:
        return {"lift_header": [], "lift_rows": [], "lift_lines": []}
    header, rows = lifts_of(found)
    return {
        "lift_header": header,
        "lift_rows": rows,
        "lift_lines": [line.removeprefix("- ").replace("*", "") for line in summary(found)],
    }


def _table(table: ResultTable) -> dict[str, Any]:
    header, rows = grid_of(table)
    return {"title": table.title, "header": header, "rows": rows}


def _about(table: ResultTable) -> str:
    return f"{table.teacher} → {table.student}, {table.module}, {table.task} ({table.metric})"


def _scores(tables: Sequence[ResultTable]) -> list[Picture]:
    """Mean scores by labels, with the spread over seeds."""
    by_place: dict[str, dict[str, dict[str, tuple[float, float | None]]]] = {}
    for table in tables:
        group = by_place.setdefault(_about(table), {}).setdefault(table.labels, {})
        for row in table.rows:
            entry = row.entries.get("mean") or next(iter(row.entries.values()), None)
            if entry is not None:
                group[row.start] = (entry.score, entry.spread)
    return [_drawn(title, groups) for title, groups in by_place.items()]


def _drawn(title: str, groups: dict[str, dict[str, tuple[float, float | None]]]) -> Picture:
    """Bars of few starts, a heat map of many."""
    starts = list(dict.fromkeys(start for group in groups.values() for start in group))
    if len(starts) <= _MOST_BARS:
        return bars(groups, title, "Means, with the standard deviation over seeds where there are several.", y="score")
    values = {(start, labels): group.get(start, (None,))[0] for start in starts for labels, group in groups.items()}
    return heat_map(values, title, "Mean scores.", rows_are="")


def _languages(tables: Sequence[ResultTable]) -> list[Picture]:
    """Scores by start and language, of tables that have several languages."""
    found = []
    for table in tables:
        if len(table.languages) > 1:
            values = {
                (row.start, language): row.entries[language].score if language in row.entries else None
                for row in table.rows
                for language in table.languages
            }
            found.append(heat_map(values, f"{table.title}, by language", table.title, rows_are="student starts from"))
    return found


def _curves(records: Sequence[Record]) -> list[Picture]:
    """Validation scores over training steps."""
    found = []
    for key, budgets in curve_panels(records).items():
        for budget, starts in budgets.items():
            title = f"{', '.join(key)}, {budget} labels"
            found.append(curves(starts, title, title, x="steps", y="validation score"))
    return found
