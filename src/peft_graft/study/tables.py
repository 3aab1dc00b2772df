"""The tables and figures of a study, made from the records of its finished cells alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from peft_graft.config import AUTO
from peft_graft.study.spec import CONTROL, CONTROL_NAMES, FRESH, POLISHED_FRESH

TEACHER = "teacher"
#: The control that is compared with starts of all lengths.
UNPOLISHED = CONTROL + CONTROL_NAMES["head"]
MEAN = "mean"
#: A teacher that is ahead of a fresh module by less, a point of a hundred, has no gain of which there could be a share.
SMALLEST_GAIN = 0.01
#: How a start's name says on how many texts it is made.
_TEXTS = re.compile(r", (\d+) texts")
#: Signs that mean something in LaTeX, and can stand in names.
_SIGNS = re.compile(r"[&%$#_{}]")
#: What a table is about.
_TABLE = ["teacher", "student", "module", "task", "budget"]


@dataclass(frozen=True)
class Entry:
    """One place of a table: a start in one language, or over all of them.

    Attributes:
        score: mean over seeds (and languages). spread: standard deviation over seeds, None with one.
        difference, share: from the fresh module's score at the same budget, and as a share of what the teacher is above
            it; None without one, and for the teacher and the fresh module themselves.
        over_controls: difference from the score of the best control that was polished as long, or not at all, a fresh
            module that was polished among them; None without controls, and for those themselves.
    """

    score: float
    spread: float | None
    runs: int
    difference: float | None = None
    share: float | None = None
    over_controls: float | None = None


@dataclass(frozen=True)
class Row:
    """One start.

    Attributes:
        p: of the paired test against the fresh module (``paired_p``). holm: the same, corrected for all tests of the
            tables that it stands among (``holm``). over_controls: the largest p of the tests against each control that
            ``Entry.over_controls`` is among.
    """

    start: str
    entries: dict[str, Entry]
    p: float | None = None
    holm: float | None = None
    over_controls: float | None = None


@dataclass(frozen=True)
class ResultTable:
    """Teacher, fresh module and every start of one pair, module, task and budget, by language.

    ``budget``: labelled examples, ``all``, or 0 for students before they learned from any.
    """

    teacher: str
    student: str
    module: str
    task: str
    budget: int | str
    metric: str
    languages: list[str]
    rows: list[Row]

    @property
    def title(self) -> str:
        """What it is about."""
        return f"{self.teacher} → {self.student}, {self.module}, {self.task}, {self.labels} ({self.metric})"

    @property
    def labels(self) -> str:
        """The budget in words."""
        return {0: "no labels", "all": "all labels"}.get(self.budget, f"{self.budget} labels")


def share_of_gain(grafted: float, baseline: float, teacher: float, *, least: float = SMALLEST_GAIN) -> float | None:
    """(grafted - baseline) / (teacher - baseline); None where the teacher is not ahead by ``least``."""
    return (grafted - baseline) / (teacher - baseline) if teacher - baseline >= least else None


def mean_spread(values: Sequence[float], *, count: bool = True, digits: int = 3) -> str:
    """``0.613 ± 0.011 (3)``: mean, standard deviation over seeds, and how many."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}" + (f" ({len(values)})" if count else "")


def pair_title(teacher: str, student: str, *what: str) -> str:
    """Two models, a kind of module, a task and a language, as headings have them; a LoRA and English go without
    saying."""
    return ", ".join([f"{teacher} → {student}", *(part for part in what if part not in ("lora", "en"))])


def without_length(start: str) -> str:
    """A start's name without how long it was polished."""
    return re.sub(r", polish \d+", "", start)


def texts_of(start: str) -> int | None:
    """The unlabelled texts that a start is said to be made on; None where nothing is said."""
    found = _TEXTS.search(start)
    return int(found.group(1)) if found else None


def without_texts(start: str) -> str:
    """A start's name without them."""
    return _TEXTS.sub("", start)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> str:
    """Spearman's, as pages say it: ``0.97 (p = 2e-05, 9 grafts)``."""
    from scipy.stats import spearmanr

    rho = spearmanr([first for first, _ in pairs], [second for _, second in pairs])
    return f"{rho.statistic:.2f} (p = {rho.pvalue:.1g}, {len(pairs)} grafts)"


def scores_of(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for every score: what its table is about, ``metric``, ``start``, ``language``, ``seed``, ``score``.

    A fresh module and a teacher have a row for each pair of models that they belong to; the score of a student before
    it learned from labels has budget 0.
    """
    students = [record for record in records if record["kind"] == "student"]
    grafted = [record["names"] for record in students if record["names"]["start"] != FRESH]
    pairs = list(dict.fromkeys((names["teacher"], names["student"]) for names in grafted))
    rows: list[dict[str, Any]] = []
    for record in students:
        names, result = record["names"], record["result"]
        values = {0: result["before"]} if "before" in result else {}
        for teacher, student in pairs:
            if names["student"] == student and names.get("teacher", teacher) == teacher:
                rows += [
                    {**names, "teacher": teacher, "metric": result["metric"], "budget": budget, "score": value}
                    for budget, value in {**values, names["budget"]: result["score"]}.items()
                ]
    tables = {tuple(row[name] for name in _TABLE): row["metric"] for row in rows}
    for record in [record for record in records if record["kind"] == TEACHER]:
        names = record["names"]
        for table, metric in tables.items():
            if (names["teacher"], names["module"], names["task"]) == (table[0], *table[2:4]):
                about = dict(zip(_TABLE, table, strict=True))
                score = record["result"]["score"]
                rows.append({**names, **about, "metric": metric, "start": TEACHER, "seed": 0, "score": score})
    return pd.DataFrame(rows, columns=[*_TABLE, "metric", "start", "language", "seed", "score"])


def result_tables(records: Sequence[Mapping[str, Any]]) -> list[ResultTable]:
    """All tables of the records: one without labels and one for each budget, by pair, module and task."""
    groups, polish = dict(iter(scores_of(records).groupby(_TABLE, sort=False))), polish_of(records)
    order = {0: -1.0, "all": math.inf}
    keys = sorted(groups, key=lambda key: (*map(str, key[:4]), order.get(key[4], key[4])))
    return _corrected(
        [_table(key, groups[key], polish) for key in keys if set(groups[key]["start"]) - {FRESH, TEACHER}]
    )


def _corrected(tables: list[ResultTable]) -> list[ResultTable]:
    """The tables with every p corrected for how many there are."""
    corrected = iter(holm([row.p for table in tables for row in table.rows if row.p is not None]))
    return [
        replace(table, rows=[row if row.p is None else replace(row, holm=next(corrected)) for row in table.rows])
        for table in tables
    ]


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the k-th smallest of n p-values times n - k + 1, none below one before it."""
    found, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, values[place] * (len(values) - rank)))
        found[place] = largest
    return found


def polish_of(records: Sequence[Mapping[str, Any]]) -> dict[str, int | str]:
    """The length of the polish of every start that has one, as the cells say that it is made by."""
    options = {one["id"]: one["config"]["transfer"] for one in records if "transfer" in one.get("config", {})}
    return {
        record["names"]["start"]: options[graft].get("polish", AUTO)
        for record in records
        if (graft := record.get("needs", {}).get("graft")) in options
    }


def _table(key: tuple[Any, ...], group: pd.DataFrame, polish: Mapping[str, int | str]) -> ResultTable:
    scores = group.pivot_table(index="start", columns=["language", "seed"], values="score")
    starts = [name for name in (TEACHER, FRESH) if name in scores.index]
    starts += sorted(set(scores.index) - {TEACHER, FRESH})
    known = {start: set(scores.loc[start].dropna().index.get_level_values("language")) for start in starts}
    # Means are over the languages in which everything is there, so that rows can be compared.
    common = sorted(set.intersection(*known.values()))
    languages = sorted(set.union(*known.values()))
    means = scores.T.groupby("language").mean().T
    rows = []
    for start in starts:
        tested = start not in (TEACHER, FRESH)
        controls = controls_of(start, starts, polish) if tested else []
        entries = {
            language: _entry(scores, means, start, [language], controls)
            for language in languages
            if language in known[start]
        }
        if common:
            entries[MEAN] = _entry(scores, means, start, common, controls)
        against = [paired_p(scores, start, control) for control in controls]
        known_p = [p for p in against if p is not None]
        over = max(known_p) if known_p and len(known_p) == len(against) else None
        rows.append(Row(start, entries, paired_p(scores, start) if tested else None, over_controls=over))
    teacher, student, module, task, budget = key
    return ResultTable(teacher, student, module, task, budget, group["metric"].iloc[0], languages, rows)


def _entry(
    scores: pd.DataFrame, means: pd.DataFrame, start: str, languages: Sequence[str], controls: Sequence[str]
) -> Entry:
    """``means``: over the seeds, a row for each start and a column for each language."""

    def mean_of(name: str) -> float | None:
        if name not in means.index:
            return None
        found = means.loc[name, languages]
        return None if found.isna().any() else float(found.mean())

    own = scores.loc[start, languages].dropna()
    # Spread is over the seeds that every language has.
    by_seed = own.unstack("language").dropna().mean(axis=1)
    score, fresh, teacher = mean_of(start), mean_of(FRESH), mean_of(TEACHER)
    assert score is not None
    spread = float(by_seed.std()) if len(by_seed) > 1 else None
    if start in (FRESH, TEACHER) or fresh is None:
        return Entry(score, spread, len(own))
    share = share_of_gain(score, fresh, teacher) if teacher is not None else None
    known = [value for name in controls if (value := mean_of(name)) is not None]
    best = score - max(known) if known else None
    return Entry(score, spread, len(own), difference=score - fresh, share=share, over_controls=best)


def controls_of(start: str, names: Iterable[str], polish: Mapping[str, int | str]) -> list[str]:
    """The controls that had as many texts and steps of polish, or none, and with them the fresh module that had as
    many."""
    controls = [name for name in names if name.startswith(CONTROL)]
    if not controls or start.startswith((CONTROL, POLISHED_FRESH)):
        return []
    polished = [name for name in names if name.startswith((CONTROL, POLISHED_FRESH))]
    alike = [name for name in polished if texts_of(name) == texts_of(start)]
    return [name for name in alike if without_texts(name) == UNPOLISHED or polish.get(name) == polish.get(start)]


def paired_p(scores: pd.DataFrame, start: str, other: str = FRESH) -> float | None:
    """Two-sided Wilcoxon signed-rank test of a start against another one, paired by language and seed.

    None with fewer than six pairs that differ, with which no difference could be significant at 5 %.

    Args:
        scores: a row for each start, a column for each language and seed.
    """
    if other not in scores.index:
        return None
    differences = (scores.loc[start] - scores.loc[other]).dropna()
    if (differences != 0).sum() < 6:
        return None
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue)


# ---- forms -----------------------------------------------------------------------------------------------------------


def cell_text(entry: Entry | None, *, share: bool = False) -> str:
    """``71.3 ± 0.4``, in points of a hundred."""
    if entry is None:
        return ""
    if share:
        return "" if entry.share is None else f"{entry.share:+.0%}"
    return f"{100 * entry.score:.1f}" + (f" ± {100 * entry.spread:.1f}" if entry.spread is not None else "")


def grid_of(table: ResultTable) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: languages, mean, differences from fresh and the best control, share of the gain, p."""
    several = len(table.languages) > 1
    controlled = any(row.start.startswith(CONTROL) for row in table.rows)
    more = ["Δ best control", "p (controls)"] if controlled else []
    tested = any(row.p is not None for row in table.rows)
    corrected = ["p (Holm)"] if tested else []
    header = [
        "",
        *table.languages,
        *([MEAN] if several else []),
        "Δ fresh",
        *more,
        "share of the gain",
        "p",
        *corrected,
    ]
    lines = []
    for row in table.rows:
        last = row.entries.get(MEAN)
        cells = [cell_text(row.entries.get(language)) for language in table.languages]
        over = "" if last is None or last.over_controls is None else f"{100 * last.over_controls:+.1f}"
        lines.append(
            [
                row.start,
                *cells,
                *([cell_text(last)] if several else []),
                "" if last is None or last.difference is None else f"{100 * last.difference:+.1f}",
                *([over, "" if row.over_controls is None else f"{row.over_controls:.2g}"] if controlled else []),
                cell_text(last, share=True),
                *("" if p is None else f"{p:.2g}" for p in (row.p, *([row.holm] if tested else []))),
            ]
        )
    return header, lines


def markdown(tables: Sequence[ResultTable]) -> str:
    """All tables in Markdown."""
    parts = []
    for table in tables:
        header, lines = grid_of(table)
        rows = [header, ["---"] * len(header), *lines]
        parts.append(f"### {table.title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[ResultTable]) -> str:
    """All tables in LaTeX, for booktabs."""
    parts = []
    for table in tables:
        header, lines = grid_of(table)
        frame = pd.DataFrame(lines, columns=header)
        caption = _SIGNS.sub(r"\\\g<0>", table.title)
        columns = "l" + "r" * (len(header) - 1)
        parts.append(frame.to_latex(index=False, escape=True, caption=caption, column_format=columns))
    text = "\n".join(parts)
    for plain, command in (("±", r"$\pm$"), ("→", r"$\rightarrow$"), ("Δ", r"$\Delta$")):
        text = text.replace(plain, command)
    return text


def comma_separated(tables: Sequence[ResultTable]) -> str:
    """Every entry of every table as one line of CSV."""
    rows = [
        {
            "teacher": table.teacher, "student": table.student, "module": table.module, "task": table.task,
            "budget": table.budget, "metric": table.metric, "start": row.start, "language": language,
            "score": entry.score, "spread": entry.spread, "runs": entry.runs, "difference": entry.difference,
            "share_of_gain": entry.share, "over_controls": entry.over_controls,
            "p_over_controls": row.over_controls if language == MEAN else None,
            "p": row.p if language == MEAN else None, "p_holm": row.holm if language == MEAN else None,
        }
        for table in tables
        for row in table.rows
        for language, entry in row.entries.items()
    ]  # fmt: skip
    return str(pd.DataFrame(rows).to_csv(index=False))


def write_tables(records: Sequence[Mapping[str, Any]], folder: Path) -> list[ResultTable]:
    """Write results.md, results.csv, results.tex, and curves.png and .svg of every pair, module and task."""
    tables = result_tables(records)
    folder.mkdir(parents=True, exist_ok=True)
    forms: dict[str, Callable[[Sequence[ResultTable]], str]] = {
        "results.md": markdown, "results.csv": comma_separated, "results.tex": latex
    }  # fmt: skip
    for name, form in forms.items():
        (folder / name).write_text(form(tables), encoding="utf-8")
    draw_curves(records, folder)
    return tables


def curve_panels(
    records: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, ...], dict[Any, dict[str, list[tuple[float, float]]]]]:
    """Validation score over training steps, the mean over languages and seeds: student, module and task -> budget ->
    start -> points, the fresh module first."""
    curves: dict[tuple[str, ...], dict[Any, dict[str, list[list[list[float]]]]]] = {}
    for record in records:
        if record["kind"] == "student" and record["result"].get("curve"):
            names = record["names"]
            panel = curves.setdefault((names["student"], names["module"], names["task"]), {})
            panel.setdefault(names["budget"], {}).setdefault(names["start"], []).append(record["result"]["curve"])
    return {
        key: {
            budget: {
                start: [
                    (statistics.fmean(point[0] for point in points), statistics.fmean(point[1] for point in points))
                    for points in zip(*found, strict=False)  # as far as the shortest goes
                ]
                for start, found in sorted(starts.items(), key=lambda item: (item[0] != FRESH, item[0]))
            }
            for budget, starts in budgets.items()
        }
        for key, budgets in curves.items()
    }


def draw_curves(records: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """The curves of ``curve_panels``, a figure for each pair, module and task."""
    from matplotlib.figure import Figure

    written = []
    for key, budgets in curve_panels(records).items():
        figure = Figure(figsize=(4.5 * len(budgets), 3.4), layout="constrained")
        for index, (budget, starts) in enumerate(budgets.items()):
            axes = figure.add_subplot(1, len(budgets), index + 1)
            for start, points in starts.items():
                style = "--" if start == FRESH else "-"
                axes.plot(*zip(*points, strict=True), label=start, marker=".", linestyle=style)
            axes.set(title=f"{budget} labels", xlabel="steps", ylabel="validation score")
            axes.legend(fontsize="small")
        figure.suptitle(", ".join(key))
        plain = "".join(char if char.isalnum() or char in "-." else "_" for char in "-".join(key))
        for suffix in ("png", "svg"):
            path = folder / f"curves-{plain}.{suffix}"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written
