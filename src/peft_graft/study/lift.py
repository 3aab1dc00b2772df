"""Lift: what grafts of language models keep of what all labels are worth to a module on the student itself.

    lift = (score - score of the student without a module) / (score of a fresh module on all labels - the same)

It is not defined where that fresh module gains less than three points of a hundred. The fresh module on all labels is
the teacher of the student's own model, where the study has no other.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from peft_graft.errors import StudyError
from peft_graft.study.results import Record, about
from peft_graft.study.spec import DEFAULT, FRESH, Budget
from peft_graft.study.tables import mean_spread, rank_correlation, share_of_gain

#: What a fresh module on all labels has to gain at least.
SMALLEST_GAIN = 0.03
#: Labels of a student that has few.
_FEW = 100
_score, _share = partial(mean_spread, count=False), partial(mean_spread, count=False, digits=2)


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

    def lift(self, score: float) -> float | None:
        """None where it is not defined."""
        bare = statistics.fmean(self.scores(FRESH, 0))  # a fresh module changes nothing
        return share_of_gain(score, bare, self.all_labels, least=SMALLEST_GAIN)

    def lifts(self, start: str, budget: Budget) -> list[float]:
        """Of every seed; none where they are not defined."""
        return [value for score in self.scores(start, budget) if (value := self.lift(score)) is not None]


# ---- reading ---------------------------------------------------------------------------------------------------------


def cells_of(records: Sequence[Record]) -> list[Cell]:
    """Every pair and task that has grafts, in the order of the records.

    Raises:
        StudyError: there is no score of a teacher, of a student without a module, or of a fresh one on all labels.
    """
    by_id = {record["id"]: record for record in records}
    teachers = {about(one, "teacher"): float(one["result"]["score"]) for one in records if one["kind"] == "teacher"}
    fresh: dict[tuple[str, ...], dict[int, Student]] = {}
    grafts: dict[tuple[str, ...], dict[str, dict[int, Student]]] = {}
    metrics: dict[str, str] = {}
    for record in records:
        if record["kind"] != "student":
            continue
        names, own = record["names"], about(record, "student")
        by_seed = fresh.setdefault(own, {})
        if names["start"] != FRESH:
            by_seed = grafts.setdefault((names["teacher"], *own), {}).setdefault(names["start"], {})
        student = by_seed.setdefault(names["seed"], Student())
        student.scores[names["budget"]] = float(record["result"]["score"])
        _add_verdict(student, by_id.get(record.get("needs", {}).get("graft")))
        metrics[names["task"]] = record["result"]["metric"]
    found = []
    for (teacher, model, module, task, language), starts in grafts.items():
        title, key = f"{task}, {teacher} → {model}", (model, module, task, language)
        alone = fresh[key]
        on_all = [one.scores["all"] for one in alone.values() if "all" in one.scores]
        everything = statistics.fmean(on_all) if on_all else teachers.get(key)
        of_teacher = teachers.get((teacher, module, task, language))
        if of_teacher is None or everything is None or not any(0 in one.scores for one in alone.values()):
            raise StudyError(
                "the results have too little to compare grafts with",
                where=title,
                expected="the teacher, and the student with a fresh module without labels and on all of them",
            )
        found.append(Cell(title, metrics[task], of_teacher, everything, {FRESH: alone, **starts}))
    return found


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
                _score(cell.scores(start, 0)),
                "" if start == FRESH else _share(cell.lifts(start, 0)),
                _score(cell.scores(start, _FEW)),
                _share(cell.lifts(start, _FEW)),
                _share([one.exact for one in students.values() if one.exact is not None]),
                _share([one.agreement for one in students.values() if one.agreement is not None]),
            ]
            lines.append(f"| {about if start == FRESH else ''} | {start} | {' | '.join(shown)} |")
    return [*lines, "", *summary(cells)]


def lifts(records: Sequence[Record]) -> list[str]:
    """One row for every cell: what the default comes to without labels, beside fresh modules."""
    header, rows = lifts_of(cells_of(records))
    lines = [[*row[:3], f"**{row[3]}**", *row[4:]] for row in rows]
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(line)} |" for line in lines)]


def lifts_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of ``lifts``, as text."""
    default = _default(cells)
    of_all = ("student alone", f"fresh, {_FEW} labels", "graft, no labels", "fresh, all", "teacher", "lift")
    rows = [
        [
            f"{cell.about} ({cell.metric})",
            _score(cell.scores(FRESH, 0)),
            _score(cell.scores(FRESH, _FEW)),
            _score(cell.scores(default, 0)),
            f"{cell.all_labels:.3f}",
            f"{cell.teacher:.3f}",
            _share(cell.lifts(default, 0)),
        ]
        for cell in cells
    ]
    return ["task and models", *of_all], rows


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
    known = [
        (student.agreement, value)
        for cell in cells
        for start, students in cell.students.items()
        for student in students.values()
        if start != FRESH and student.agreement is not None and 0 in student.scores
        if (value := cell.lift(student.scores[0])) is not None
    ]
    if len(known) <= 3:
        return []
    what = "- rank correlation (Spearman) of the verdict's agreement with the lift without labels:"
    return [f"{what} {rank_correlation(known)}"]


def prices(records: Sequence[Record]) -> list[str]:
    """What students without labels score, beside the seconds that it took to make what they start from."""
    by_id = {record["id"]: record for record in records}
    rows = ["| task and models | student starts from | score | seconds |", "|---|---|---|---|"]
    for record in records:
        names, result = record["names"], record["result"]
        if record["kind"] != "student" or names["start"] == FRESH or names["budget"] != 0:
            continue
        graft = by_id.get(record["needs"].get("graft"))
        seconds = graft["seconds"] if graft else result["seconds"]["all"]
        title = f"{names['task']}, {names['teacher']} → {names['student']} ({result['metric']})"
        rows.append(f"| {title} | {names['start']} | {result['score']:.3f} | {seconds:.0f} |")
    return [*rows[:2], *sorted(rows[2:])]


def times(records: Sequence[Record]) -> list[str]:
    """How long moves took whose students were scored by the default, in minutes, on each kind of hardware.

    Raises:
        StudyError: the results have no such move.
    """
    taken: dict[tuple[str, str], list[float]] = {}
    for record in records:
        start, result = record["names"].get("start", ""), record["result"]
        if record["kind"] == "graft" and start.startswith(DEFAULT):
            seconds = result["total_seconds"] if "total_seconds" in result else record["seconds"]
            has = record["hardware"]
            where = f"one {has['gpu']}" if "gpu" in has else f"{has['cpus']} CPU cores"
            taken.setdefault((start, where), []).append(seconds / 60)
    if not taken:
        raise StudyError("the results have no move by the default", where="times")
    (start, where), minutes = max(taken.items(), key=lambda found: len(found[1]))
    span = f"{min(minutes):.1f} to {max(minutes):.1f} minutes, {statistics.median(minutes):.1f} in the median"
    return [f"- {len(minutes)} move{'s' * (len(minutes) > 1)} (*{start}*) on {where}: {span}"]
