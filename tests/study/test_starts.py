"""Distances from the teacher on the way, by where a polish began, from records as studies publish them."""

from __future__ import annotations

import math
from typing import Any

from peft_graft.distill.polish import PolishSettings
from peft_graft.study.starts import Course, starts

NAMES = {"teacher": "A", "student": "B", "module": "lora", "task": "ner", "language": "en"}


def record(start: str, seed: int, values: list[float | None], kind: str = "graft", pilots: int = 1) -> dict[str, Any]:
    """A polish of 60 steps in all, of which each trial but the first took 6."""
    steps = 60 - 6 * (pilots - 1)
    due = [0, *sorted({round(steps * part / 6) for part in range(1, 7)})]
    curve = [{"step": step, "agreement": None, "divergence": value} for step, value in zip(due, values, strict=True)]
    trials = {f"moved {rate}": {"step": 6, "agreement": None, "divergence": 1.0} for rate in range(pilots)}
    settings = PolishSettings(steps=steps).model_dump()
    polish = {"settings": settings, "start": "moved", "pilots": trials, "samples": 9, "curve": curve}
    return {"id": f"{start}-{seed}", "kind": kind, "names": {**NAMES, "start": start, "seed": seed}, "needs": {},
            "result": {"polish": polish}}  # fmt: skip


FRESH = [record("polish from fresh, polish 60", seed, [9.0, 5, 4, 3, 2, 1, 0.5 + seed], "polish") for seed in (0, 1)]


def test_a_start_that_is_ahead_gets_there_sooner() -> None:
    """Steps of trials count: of the 48 in the course, a third follow 16 and 12 more that were tried in vain."""
    ahead = [record("default, polish 60", seed, [3.0, 2, 1, 0.9, 0.8, 0.7, 0.6], pilots=3) for seed in (0, 1)]
    lines = starts([*ahead, *FRESH])
    assert lines[:5] == [
        "- *default* is where a fresh start ends within half of the steps in 1 of 1",
        "",
        "### A → B, ner, 60 steps",
        "",
        "| nats from the teacher, after | no step | 1/6 | 2/6 | 3/6 | 4/6 | 5/6 | all "
        "| steps to where *polish from fresh* ends |",
    ]
    assert lines[6].startswith("| default (2) | 3.000 ± 0.000 | 2.000 ± 0.000 |")
    assert lines[6].endswith("| 28 |")
    assert lines[7].endswith("| 1.000 ± 0.707 |  |")


def test_one_that_never_gets_there_or_diverges_says_so() -> None:
    slow = record("control: random module, polish 60", 0, [9.0, 9, 8, 8, 7, None, 6], "control")
    lines = starts([slow, *FRESH])
    assert lines[5] == "| control: random module (1) | 9.000 | 9.000 | 8.000 | 8.000 | 7.000 | inf | 6.000 | never |"
    assert Course.of(slow).reaches(6.5) == 60
    assert Course.of(slow).reaches(1) == math.inf


def test_what_cannot_be_compared_is_left_out() -> None:
    bare = record("control: bare teacher, polish 60", 0, [1.0] * 7, "control")
    other = {
        **record("default, polish 60", 0, [1.0] * 7),
        "names": {**NAMES, "task": "sick", "start": "default, polish 60"},
    }
    assert starts([bare, *FRESH]) == []
    assert starts([other, *FRESH]) == []
    assert starts([{**bare, "kind": "teacher", "result": {}}]) == []
