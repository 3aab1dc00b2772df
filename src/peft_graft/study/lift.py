"""Lift: what grafts of language models keep of what all labels are worth to a module on the student itself.

    lift = (score - score of the student without a module) / (score of a fresh module on all labels - the same)

It is not defined where that fresh module gains less than three points of a hundred. The fresh module on all labels is
the teacher of the student's own model, where the study has no other.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from peft_graft.errors import StudyError
from peft_graft.study.results import Record
from peft_graft.study.spec import DEFAULT, FRESH, Budget

#: What a fresh module on all labels has to gain at least.
SMALLEST_GAIN = 0.03
#: Labels of a student that has few.
_FEW = 100


@dataclass
class Student:
    """A student of one start and seed.

    Attributes:
        scores: by budget. exact, agreement: of its graft's verdict, by generation; None where there is none.
    """

    scores: dict[Budget, float] = field(default_factory=dict)
    exact: float | None = None
    agreement: float | None = None


@dataclass
class Cell:
    """A pair of models and a task.

    Attributes:
        about: the task and the models. metric: of the scores. teacher: its score.
        all_labels: that of a fresh module on all labels. students: by start, ``FRESH`` first, and seed.
    """

    about: str
    metric: str
    teacher: float
    all_labels: float
    students: dict[str, dict[int, Student]]

    def scores(self, start: str, budget: Budget) -> list[float]:
        """Of every seed."""
        students = self.students.get(start, {}).values()
        return [student.scores[budget] for student in students if budget in student.scores]

    def lifts(self, start: str, budget: Budget) -> list[float]:
        """Of every seed; none where they are not defined."""
        bare = statistics.fmean(self.scores(FRESH, 0))  # a fresh module changes nothing
        gain = self.all_labels - bare
        return [(score - bare) / gain for score in self.scores(start, budget)] if gain >= SMALLEST_GAIN else []


# ---- reading ---------------------------------------------------------------------------------------------------------


def cells_of(records: Sequence[Record]) -> list[Cell]:
    """Every pair and task that has grafts, in the order of the records.

    Raises:
        StudyError: there is no score of a teacher, of a student without a module, or of a fresh one on all labels.
    """
    by_id = {record["id"]: record for record in records}
    teachers = {_about(one, "teacher"): float(one["result"]["score"]) for one in records if one["kind"] == "teacher"}
    fresh: dict[tuple[str, ...], dict[int, Student]] = {}
    grafts: dict[tuple[str, ...], dict[str, dict[int, Student]]] = {}
    metrics: dict[str, str] = {}
    for record in records:
        if record["kind"] != "student":
            continue
        names, own = record["names"], _about(record, "student")
        by_seed = fresh.setdefault(own, {})
        if names["start"] != FRESH:
            by_seed = grafts.setdefault((names["teacher"], *own), {}).setdefault(names["start"], {})
        student = by_seed.setdefault(names["seed"], Student())
        student.scores[names["budget"]] = float(record["result"]["score"])
        _add_verdict(student, by_id.get(record.get("needs", {}).get("graft")))
        metrics[names["task"]] = record["result"]["metric"]
    found = []
    for (teacher, model, module, task, language), starts in grafts.items():
        about, key = f"{task}, {teacher} → {model}", (model, module, task, language)
        alone = fresh[key]
        everything = [one.scores["all"] for one in alone.values() if "all" in one.scores]
        everything += [teachers[key]] if key in teachers else []
        of_teacher = teachers.get((teacher, module, task, language))
        if of_teacher is None or not everything or not any(0 in one.scores for one in alone.values()):
            raise StudyError(
                "the results have too little to compare grafts with",
                where=about,
                expected="the teacher, and the student with a fresh module without labels and on all of them",
            )
        found.append(Cell(about, metrics[task], of_teacher, everything[0], {FRESH: alone, **starts}))
    return found


def _about(record: Record, model: str) -> tuple[str, ...]:
    return tuple(record["names"][name] for name in (model, "module", "task", "language"))


def _add_verdict(student: Student, graft: Record | None) -> None:
    generated = graft["result"]["verdict"].get("generated") if graft else None
    if generated:
        student.exact, student.agreement = generated["exact"], generated["agreement"]


# ---- tables ----------------------------------------------------------------------------------------------------------


def lift(records: Sequence[Record]) -> list[str]:
    """The table of all cells, and what they come to."""
    cells = cells_of(records)
    lines = [
        "| task and models | student starts from | no labels | lift | 100 labels | lift | answers as the teacher "
        "| agreement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        about = f"{cell.about} ({cell.metric}); teacher {cell.teacher:.3f}, all labels {cell.all_labels:.3f}"
        for start, students in cell.students.items():
            shown = [
                _mean(cell.scores(start, 0)),
                "" if start == FRESH else _mean(cell.lifts(start, 0), 2),
                _mean(cell.scores(start, _FEW)),
                _mean(cell.lifts(start, _FEW), 2),
                _mean([one.exact for one in students.values() if one.exact is not None], 2),
                _mean([one.agreement for one in students.values() if one.agreement is not None], 2),
            ]
            lines.append(f"| {about if start == FRESH else ''} | {start} | {' | '.join(shown)} |")
    return [*lines, "", *summary(cells)]


def lifts(records: Sequence[Record]) -> list[str]:
    """One row for every cell: what the default comes to without labels, beside fresh modules."""
    cells = cells_of(records)
    default = _default(cells)
    lines = [
        "| task and models | student alone | fresh, 100 labels | graft, no labels | fresh, all | teacher | lift |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        shown = [
            _mean(cell.scores(FRESH, 0)),
            _mean(cell.scores(FRESH, _FEW)),
            f"**{_mean(cell.scores(default, 0))}**",
            f"{cell.all_labels:.3f}",
            f"{cell.teacher:.3f}",
            _mean(cell.lifts(default, 0), 2),
        ]
        lines.append(f"| {cell.about} ({cell.metric}) | {' | '.join(shown)} |")
    return lines


def _default(cells: Sequence[Cell]) -> str:
    """The start that is the default, whatever its polish; the first start where none is."""
    starts = [start for cell in cells for start in cell.students if start != FRESH]
    return next((start for start in starts if start.startswith(DEFAULT)), starts[0])


def summary(cells: Sequence[Cell]) -> list[str]:
    """Medians over cells, the default beside every other start, and how well the verdict foretells the lift."""
    starts = list(dict.fromkeys(start for cell in cells for start in cell.students if start != FRESH))
    default, lines = _default(cells), []
    for budget, what in ((0, "without labels"), (_FEW, f"with {_FEW} labels")):
        lifts = [statistics.fmean(values) for cell in cells if (values := cell.lifts(default, budget))]
        if lifts:
            span = f"{min(lifts):.2f} to {max(lifts):.2f}, {len(lifts)} cells"
            lines.append(f"- median lift of *{default}* {what}: **{statistics.median(lifts):.2f}** ({span})")
    for other, budget, what in [(FRESH, _FEW, f"a fresh module on {_FEW} labels"),
                                *[(start, 0, f"*{start}*") for start in starts if start != default]]:  # fmt: skip
        both = [
            (statistics.fmean(mine), statistics.fmean(theirs))
            for cell in cells
            if (mine := cell.scores(default, 0)) and (theirs := cell.scores(other, budget))
        ]
        if both:
            ahead, mean = sum(a >= b for a, b in both), statistics.fmean(a - b for a, b in both)
            counted = f"level or ahead in {ahead} of {len(both)} cells, {mean:+.3f} on average"
            lines.append(f"- without labels, beside {what}: {counted}")
    return [*lines, *_verdicts(cells)]


def _verdicts(cells: Sequence[Cell]) -> list[str]:
    """Whether the agreement of generated answers, known before any label, predicts the lift."""
    from scipy.stats import spearmanr

    known = [
        (student.agreement, value)
        for cell in cells
        for start, students in cell.students.items()
        if start != FRESH
        for student, value in zip(
            [one for one in students.values() if 0 in one.scores], cell.lifts(start, 0), strict=False
        )
        if student.agreement is not None
    ]
    if len(known) <= 3:
        return []
    rho = spearmanr([agreement for agreement, _ in known], [value for _, value in known])
    return [
        f"- rank correlation (Spearman) of the verdict's agreement with the lift without labels: {rho.statistic:.2f} "
        f"(p = {rho.pvalue:.1g}, {len(known)} grafts)"
    ]


def _mean(values: Sequence[float], digits: int = 3) -> str:
    """``0.613 ± 0.011``: mean, and standard deviation over seeds where there are some."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"
