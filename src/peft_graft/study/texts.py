"""What grafts are worth by how many unlabelled texts they were made on, beside modules that learned from labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from peft_graft.study.results import Record
from peft_graft.study.spec import CONTROL, FRESH
from peft_graft.study.tables import TEACHER, mean_spread, pair_title, scores_of, texts_of, without_length, without_texts


def texts(records: Sequence[Record]) -> list[str]:
    """A table for each pair of models and task: a row for each number of texts, a column for each start, and from how
    many on the first start that is no control is ahead of a fresh module on labels in every seed, and stays ahead."""
    lines: list[str] = []
    scores = scores_of(records)
    for (teacher, student, module, task), found in scores.groupby(["teacher", "student", "module", "task"], sort=False):
        unlabelled = found[(found["budget"] == 0) & found["start"].map(texts_of).notna()]
        if unlabelled.empty:
            continue
        starts = list(dict.fromkeys(without_texts(start) for start in unlabelled["start"]))
        graft = next((start for start in starts if not start.startswith(CONTROL)), None)
        numbers = {number for number in map(texts_of, unlabelled["start"]) if number}
        by_number = {
            number: {start: _by_seed(unlabelled, f"{start}, {number} texts") for start in starts}
            for number in sorted(numbers)
        }
        lines += ["", f"### {pair_title(teacher, student, module, task)}", "", *_table(by_number, starts), ""]
        own = found[found["start"] == TEACHER]["score"]
        lines += [f"- teacher: {own.iloc[0]:.3f}"] if len(own) else []
        for budget in sorted({budget for budget in found["budget"] if budget not in (0, "all")}):
            fresh = _by_seed(found[found["budget"] == budget], FRESH)
            if fresh.empty:
                continue
            lines.append(f"- fresh module, {budget:,} labels: {mean_spread(fresh.tolist())}")
            if graft:
                number = ahead_from({count: values[graft] for count, values in by_number.items()}, fresh)
                lines[-1] += f"; the graft is {'never ahead' if number is None else f'ahead from {number:,} texts on'}"
    return lines


def ahead_from(grafts: Mapping[int, pd.Series], fresh: pd.Series) -> int | None:
    """The least number of texts from which on a graft's score is above a fresh module's in every seed that both have.

    Args:
        grafts: scores by seed, by number of texts. fresh: scores by seed.
    """
    found = None
    for number in sorted(grafts, reverse=True):
        differences = (grafts[number] - fresh).dropna()
        if differences.empty:
            continue
        if (differences <= 0).any():
            break
        found = number
    return found


def _by_seed(scores: pd.DataFrame, start: str) -> pd.Series:
    return scores[scores["start"] == start].groupby("seed")["score"].mean()


def _table(by_number: Mapping[int, Mapping[str, pd.Series]], starts: Sequence[str]) -> list[str]:
    shown = [without_length(start).removeprefix(CONTROL) for start in starts]
    lines = [f"| texts | {' | '.join(shown)} |", "|---" * (len(starts) + 1) + "|"]
    for number, values in by_number.items():
        cells = [mean_spread(values[start].tolist()) for start in starts]
        lines.append(f"| {number:,} | {' | '.join(cells)} |")
    return lines
