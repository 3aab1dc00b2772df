"""What the start of a polish is worth: how far from the teacher students are on the way, by where they began.

Steps in trials count as steps: those of a start that tried more arms are fewer in the course itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from peft_graft.distill.polish import PolishRecord, PolishSettings
from peft_graft.study.results import Record, about
from peft_graft.study.spec import CONTROL, CONTROL_NAMES, DEFAULT, FRESH, POLISHED_FRESH
from peft_graft.study.tables import mean_spread, pair_title, without_length

#: Points of a held-out curve after its start.
_POINTS = PolishSettings(steps=1).evaluations
#: Starts from an untrained module, with a head that nothing was fitted to.
_PLAIN = (POLISHED_FRESH, f"{FRESH}/skip")


@dataclass(frozen=True)
class Course:
    """The polish of one seed."""

    record: PolishRecord

    @staticmethod
    def of(record: Record) -> Course | None:
        """That of a graft or control; None where there was none, or another teacher's answers were learned."""
        polish = record["result"].get("polish") if record["kind"] in ("graft", "control", "polish") else None
        if not polish or record["names"]["start"].startswith(CONTROL + CONTROL_NAMES["bare-teacher"]):
            return None
        return Course(PolishRecord.model_validate(polish))

    @property
    def steps(self) -> int:
        """All of them, those of trials too."""
        return self.record.settings.steps + self.record.trial_steps

    @cached_property
    def points(self) -> list[tuple[int, float]]:
        """(steps spent, nats from the teacher on the text that chooses), from the start to the end."""
        spent = self.record.trial_steps
        return [
            (point.step + (spent if point.step else 0), math.inf if point.divergence is None else point.divergence)
            for point in self.record.curve
        ]

    @property
    def watched(self) -> list[float]:
        """Nats from the teacher at the start, and after equal parts of the course."""
        known = dict(self.points)
        return [known[0], *(known.get(step + self.record.trial_steps, math.inf) for step in self.record.settings.parts)]

    def reaches(self, wanted: float) -> float:
        """The steps after which it is as near to the teacher, infinity if it never is."""
        return next((spent for spent, value in self.points if value <= wanted), math.inf)


def starts(records: Sequence[Record]) -> list[str]:
    """A table for each pair of models, task and length of a polish in which an untrained module was polished too."""
    found: dict[tuple[tuple[str, ...], str, int], dict[str, list[Course]]] = {}
    for record in records:
        course = Course.of(record)
        if course is None:
            continue
        name = without_length(record["names"]["start"])
        place = (about(record, "teacher"), record["names"]["student"], course.steps)
        found.setdefault(place, {}).setdefault(name, []).append(course)
    lines: list[str] = []
    halves: list[bool] = []
    for ((teacher, *what), student, steps), courses in found.items():
        plain = next((name for name in _PLAIN if name in courses), None)
        if plain is None or len(courses) < 2:
            continue
        end = statistics.fmean(course.watched[-1] for course in courses[plain])
        lines += ["", f"### {pair_title(teacher, student, *what)}, {steps:,} steps", "", *_table(courses, plain, end)]
        if DEFAULT in courses:
            halves.append(_reached(courses[DEFAULT], end) <= steps / 2)
    if not halves:
        return lines
    return [
        f"- *{DEFAULT}* is where a fresh start ends within half of the steps in {sum(halves)} of {len(halves)}",
        *lines,
    ]


def _reached(courses: Sequence[Course], wanted: float) -> float:
    """The median over seeds."""
    return statistics.median_low(course.reaches(wanted) for course in courses)


def _table(courses: dict[str, list[Course]], plain: str, end: float) -> list[str]:
    parts = " | ".join("all" if part == _POINTS else f"{part}/{_POINTS}" for part in range(1, _POINTS + 1))
    lines = [
        f"| nats from the teacher, after | no step | {parts} | steps to where *{plain}* ends |",
        "|---" * (_POINTS + 3) + "|",
    ]
    for name, own in courses.items():
        values = [mean_spread(value, count=False) for value in zip(*(course.watched for course in own), strict=True)]
        steps = _reached(own, end)
        reached = "" if name == plain else "never" if steps == math.inf else f"{steps:,.0f}"
        lines.append(f"| {name} ({len(own)}) | {' | '.join(values)} | {reached} |")
    return lines
