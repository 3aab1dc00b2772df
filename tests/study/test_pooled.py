"""The default less each control over all tasks of a pair, from records as studies publish them."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import wilcoxon

from peft_graft.study.pooled import pooled

GAINS = {"ner": (0.01, 0.02, 0.03), "sick": (0.04, 0.05, -0.06)}


def students(start: str, gains: dict[str, tuple[float, ...]]) -> list[dict[str, Any]]:
    names = {"teacher": "A", "student": "B", "module": "lora", "language": "en", "budget": 0, "start": start}
    length = start.partition(", polish ")[2]
    graft = {"id": start, "kind": "graft", "names": names, "needs": {}, "result": {},
             "config": {"transfer": {"polish": int(length)} if length else {}}}  # fmt: skip
    return [graft] + [
        {"id": f"{start} {task} {seed}", "kind": "student", "names": {**names, "task": task, "seed": seed},
         "needs": {"graft": start}, "result": {"metric": "f1", "score": 0.5 + gain}}
        for task, own in gains.items()
        for seed, gain in enumerate(own)
    ]  # fmt: skip


def nothing(seeds: int = 3) -> dict[str, tuple[float, ...]]:
    return dict.fromkeys(GAINS, (0.0,) * seeds)


def test_seeds_of_all_tasks_are_compared_in_pairs() -> None:
    records = students("default, polish 100", GAINS) + students("control: random module, polish 100", nothing())
    records += students("polish from fresh, polish 100", nothing(2))
    found = pooled(records)
    p = wilcoxon([gain for own in GAINS.values() for gain in own]).pvalue
    assert found[2:] == [
        f"| A → B, 100 steps | random module | 5 of 6 | +1.5 ± 3.9 | {p:.2g} | {p:.2g} |",
        "| A → B, 100 steps | polish from fresh | 4 of 4 | +3.0 ± 1.8 | | |",
    ]


@pytest.mark.parametrize(
    "other", ["control: random module", "control: random module, polish 10", "control: head alone"]
)
def test_only_what_was_polished_as_long_is_compared(other: str) -> None:
    assert pooled(students("default, polish 100", GAINS) + students(other, nothing()))[2:] == []
    whole = pooled(students("default", GAINS) + students("control: random module", nothing()))
    assert whole[2].startswith("| A → B | random module | 5 of 6 |")
