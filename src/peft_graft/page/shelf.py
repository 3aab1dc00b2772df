"""The page of a shelf, made from its report alone: every module with its verdict, and why others could not be moved."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args
from urllib.parse import quote

from peft_graft.card import public_name
from peft_graft.distill.agreement import Level
from peft_graft.page import figures
from peft_graft.page.graft import PAGE
from peft_graft.page.render import render
from peft_graft.shelf import ShelfEntry, ShelfReport

#: From the best.
_LEVELS: tuple[Level, ...] = get_args(Level)


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
    moved, failed = len(report.modules) - len(report.failed), len(report.failed)
    counts = Counter(one.verdict.level for one in report.modules if one.verdict)
    levels = ", ".join(f"{counts[level]} {level}" for level in _LEVELS if counts[level])
    found = [
        figures.fact("modules moved", f"{moved} of {len(report.modules)}", levels),
        figures.fact("modules that failed", str(failed), "listed below" if failed else "none"),
    ]
    for label, seconds, about in (
        ("the first of a teacher", report.first_seconds, "with loading and aligning"),
        ("each one after it", report.next_seconds, "the models are there already"),
    ):
        if seconds is not None:
            found.append(figures.fact(label, figures.duration(seconds), about))
    return found


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
