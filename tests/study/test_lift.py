"""Lift, from records of which it is known by hand."""

from __future__ import annotations

from typing import Any

import pytest

from peft_graft.errors import StudyError
from peft_graft.study.lift import cells_of, lift, lifts, prices, times

ABOUT = {"module": "lora", "task": "t", "language": "en"}


def teacher(model: str, score: float) -> dict[str, Any]:
    return {
        "id": f"teacher-{model}",
        "kind": "teacher",
        "names": {**ABOUT, "teacher": model},
        "result": {"score": score},
    }


def graft(name: str, agreement: float, exact: float = 0.5) -> dict[str, Any]:
    verdict = {"generated": {"exact": exact, "agreement": agreement}}
    return {"id": name, "kind": "graft", "names": ABOUT, "result": {"verdict": verdict}}


def student(
    score: float, budget: int | str, start: str = "fresh", seed: int = 0, of: str | None = None
) -> dict[str, Any]:
    names = {**ABOUT, "student": "S", "start": start, "budget": budget, "seed": seed}
    if start != "fresh":
        names["teacher"] = "T"
    return {
        "id": f"student-{start}-{budget}-{seed}", "kind": "student", "names": names,
        "needs": {"graft": of} if of else {}, "result": {"score": score, "metric": "exact"},
    }  # fmt: skip


RECORDS = [
    teacher("T", 0.8),
    *(graft(name, agreement) for name, agreement in (("a", 0.9), ("b", 0.7), ("c", 0.2), ("d", 0.0))),
    student(0.1, 0), student(0.3, 100), student(0.6, "all"),
    student(0.5, 0, "default, polish 9", of="a"), student(0.4, 0, "default, polish 9", seed=1, of="b"),
    student(0.6, 100, "default, polish 9", of="a"),
    student(0.35, 0, "fresh/skip, polish 9", of="c"), student(0.1, 0, "ridge/skip", of="d"),
]  # fmt: skip


def test_lift_is_between_the_bare_student_and_all_labels() -> None:
    (cell,) = cells_of(RECORDS)
    assert cell.lifts("default, polish 9", 0) == pytest.approx([0.8, 0.6])
    assert cell.lifts("default, polish 9", 100) == pytest.approx([1.0])
    assert cell.lifts("ridge/skip", 0) == pytest.approx([0.0])


def test_all_labels_are_the_mean_over_seeds() -> None:
    (cell,) = cells_of([*RECORDS, student(0.8, "all", seed=1)])
    assert cell.all_labels == pytest.approx(0.7)
    (alone,) = cells_of([one for one in RECORDS if one["names"].get("budget") != "all"] + [teacher("S", 0.9)])
    assert alone.all_labels == 0.9, "the student's own teacher, where no fresh module has learned from all of them"


def test_the_table_says_what_cells_come_to() -> None:
    page = "\n".join(lift(RECORDS))
    assert "| t, T → S (exact); teacher 0.800, all labels 0.600 | fresh | 0.100 |  | 0.300 | 0.40 |  |  |" in page
    assert ("|  | default, polish 9 | 0.450 ± 0.071 | 0.70 ± 0.14 | 0.600 | 1.00 | 0.50 ± 0.00 | 0.80 ± 0.14 |") in page
    assert "median lift of *default, polish 9* without labels: **0.70** (0.70 to 0.70, 1 cells)" in page
    assert "beside a fresh module on 100 labels: level or ahead in 1 of 1 cells, +0.150 on average" in page
    assert "beside *ridge/skip*: level or ahead in 1 of 1 cells, +0.350 on average" in page
    assert "with the lift without labels: 1.00 (p = 0, 4 grafts)" in page


def test_one_row_for_each_cell() -> None:
    assert lifts(RECORDS)[2:] == [
        "| t, T → S (exact) | 0.100 | 0.300 | **0.450 ± 0.071** | 0.600 | 0.800 | 0.70 ± 0.14 |"
    ]


def test_scores_stand_beside_what_they_took() -> None:
    """The graft's seconds, or where there is no graft the student's own."""
    other = student(0.2, 0, "another tool, 9 steps")
    other["result"]["seconds"] = {"asking": 1.4, "all": 7.4}
    grafts = [{**graft("a", 0.9), "seconds": 12.3}, teacher("T", 0.8)]
    assert prices([*grafts, student(0.1, 0), student(0.5, 0, "default", of="a"), student(0.6, 100, "default"), other])[
        2:
    ] == [
        "| t, T → S (exact) | another tool, 9 steps | 0.200 | 7 |",
        "| t, T → S (exact) | default | 0.500 | 12 |",
    ]


def test_a_students_own_teacher_has_learned_from_all_labels() -> None:
    without = [record for record in RECORDS if record["names"].get("budget") != "all"]
    (cell,) = cells_of([*without, teacher("S", 0.5)])
    assert cell.all_labels == 0.5


def test_a_gain_that_is_too_small_has_no_lift() -> None:
    others = [record for record in RECORDS if record["names"].get("budget") != "all"]
    (cell,) = cells_of([*others, student(0.12, "all")])
    assert cell.lifts("default, polish 9", 0) == []


@pytest.mark.parametrize("missing", ["teacher-T", "student-fresh-0-0", "student-fresh-all-0"])
def test_what_is_missing_is_said(missing: str) -> None:
    with pytest.raises(
        StudyError, match="t, T → S: the results have too little to compare grafts with; expected the t"
    ):
        cells_of([record for record in RECORDS if record["id"] != missing])


def test_times_are_those_of_the_default_where_most_moves_were_made() -> None:
    def move(start: str, seconds: float, **hardware: object) -> dict[str, Any]:
        made = {**graft("g", 0.5), "hardware": {"cpus": 2, **hardware}, "seconds": seconds}
        return {**made, "names": {**ABOUT, "start": start}}

    earlier = move("default", 0.0)
    del earlier["seconds"]
    earlier["result"]["total_seconds"] = 120.0
    moves = [earlier, move("default", 180), move("default", 600), move("ridge", 6), move("default", 6, gpu="G")]
    assert times(moves) == ["- 3 moves (*default*) on 2 CPU cores: 2.0 to 10.0 minutes, 3.0 in the median"]
    assert times(moves[-1:]) == ["- 1 move (*default*) on one G: 0.1 to 0.1 minutes, 0.1 in the median"]
    with pytest.raises(StudyError, match="no move by the default"):
        times(moves[3:4])
