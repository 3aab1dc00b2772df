"""A graft beside its controls over all tasks of a pair of models: what a single task has too few seeds to tell."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from peft_graft.config import AUTO
from peft_graft.study.results import Record
from peft_graft.study.spec import CONTROL, DEFAULT
from peft_graft.study.tables import (
    UNPOLISHED,
    controls_of,
    holm,
    paired_p,
    polish_of,
    scores_of,
    without_length,
    without_texts,
)


def pooled(records: Sequence[Record]) -> list[str]:
    """A row for each pair of models, length of the polish and control: the default's scores without labels less the
    control's, paired by task, language and seed.

    *p* is ``tables.paired_p``, and corrected for all rows.
    """
    scores, polish = scores_of(records), polish_of(records)
    scores = scores[scores["budget"] == 0]
    rows: list[tuple[str, str, float | None]] = []
    for (teacher, student), of_pair in scores.groupby(["teacher", "student"], sort=False):
        wide = of_pair.pivot_table(index="start", columns=["task", "module", "language", "seed"], values="score")
        for start in [name for name in wide.index if without_length(name) == DEFAULT]:
            length = "" if polish.get(start, AUTO) == AUTO else f", {polish[start]} steps"
            for other in controls_of(start, wide.index, polish):
                if without_texts(other) != UNPOLISHED:
                    rows.append((f"{teacher} → {student}{length}", *_row(wide, start, other)))
    corrected = iter(holm([p for *_, p in rows if p is not None]))
    lines = ["| pair | the default less | seeds ahead | points | p | p (Holm) |", "|---|---|---|---|---|---|"]
    for pair, values, p in rows:
        shown = "| |" if p is None else f"{p:.2g} | {next(corrected):.2g} |"
        lines.append(f"| {pair} | {values} | {shown}")
    return lines


def _row(wide: pd.DataFrame, start: str, other: str) -> tuple[str, float | None]:
    """What the control is called, how many pairs are ahead and by how much; and p."""
    differences = 100 * (wide.loc[start] - wide.loc[other]).dropna()
    name = without_length(other).removeprefix(CONTROL)
    ahead = f"{int((differences > 0).sum())} of {len(differences)}"
    spread = f" ± {differences.std():.1f}" if len(differences) > 1 else ""
    return f"{name} | {ahead} | {differences.mean():+.1f}{spread}", paired_p(wide, start, other)
