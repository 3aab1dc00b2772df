"""The page of a shelf, made from its report alone: every module with its verdict, and why others could not be moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from peft_graft.card import public_name
from peft_graft.outputs import write_aside
from peft_graft.page import figures
from peft_graft.page.graft import PAGE
from peft_graft.page.render import render
from peft_graft.shelf import ShelfEntry, ShelfReport


def write_shelf_page(report: ShelfReport, name: str, file: Path) -> None:
    """Write the page of a shelf (``shelf_page``), in place of one that is there.

    Raises:
        OutputError: it cannot be written.
    """
    write_aside(file, shelf_page(report, name), force=True)


def shelf_page(report: ShelfReport, name: str) -> str:
    """One HTML file with what became of every module; it links the graft's own pages, which lie in folders beside it.

    Args:
        name: of the shelf's folder.
    """
    return render(
        "shelf.html.jinja",
        title=f"{name} · shelf report",
        name=name,
        student=public_name(report.student),
        facts=_facts(report),
        modules=[_module(one) for one in report.modules if one.state != "failed"],
        failed=report.failed,
    )


def _facts(report: ShelfReport) -> list[dict[str, str]]:
    moved = len(report.modules) - len(report.failed)
    levels = [one.verdict.level for one in report.modules if one.verdict]
    counts = [f"{levels.count(level)} {level}" for level in dict.fromkeys(sorted(levels, key=_rank(report)))]
    failed = {
        "label": "modules that failed",
        "value": str(len(report.failed)),
        "about": "listed below" if report.failed else "none",
    }
    found = [
        {"label": "modules moved", "value": f"{moved} of {len(report.modules)}", "about": ", ".join(counts)},
        failed,
    ]
    for label, seconds, about in (
        ("the first of a teacher", report.first_seconds, "with loading and aligning"),
        ("each one after it", report.next_seconds, "the models are there already"),
    ):
        if seconds is not None:
            found.append({"label": label, "value": figures.duration(seconds), "about": about})
    return found


def _rank(report: ShelfReport) -> Any:
    """Levels in the order of the best figure that has them."""
    best: dict[str, float] = {}
    for one in report.modules:
        if one.verdict:
            best[one.verdict.level] = max(best.get(one.verdict.level, -9.0), _agreement(one) or -9.0)
    return lambda level: -best[level]


def _agreement(entry: ShelfEntry) -> float | None:
    figure = entry.verdict.figure if entry.verdict else None
    return figure.agreement if figure else None


def _module(entry: ShelfEntry) -> dict[str, Any]:
    figure, agreement = entry.verdict.figure if entry.verdict else None, _agreement(entry)
    return {
        "name": entry.name,
        "page": f"{quote(entry.name)}/{PAGE}",
        "module": public_name(entry.module),
        "teacher": public_name(entry.teacher or ""),
        "level": entry.verdict.level if entry.verdict else "",
        "agreement": agreement,
        "share": min(1.0, max(0.0, agreement or 0.0)),
        "figure": "–"
        if agreement is None or not figure
        else figures.with_interval(agreement, figure.agreement_interval),
        "method": entry.method or "",
        "seconds": entry.seconds,
        "took": "" if entry.seconds is None else figures.duration(entry.seconds),
        "kept": entry.state == "kept",
    }
