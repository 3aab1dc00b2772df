"""The tables and figures of a study, made from its finished cells' files alone."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_graft.errors import DependencyError
from peft_graft.files import read_json
from peft_graft.study.cells import Cell
from peft_graft.study.comparison import share_of_gain
from peft_graft.study.runner import result_path
from peft_graft.study.spec import FRESH

TEACHER = "teacher"
MEAN = "mean"


@dataclass(frozen=True)
class Entry:
    """One place of a table: a start in one language, or over all of them.

    Attributes:
        score: mean over seeds (and languages). spread: standard deviation over seeds, None with one.
        difference, share: from the fresh module's score at the same budget, and as a share of what the teacher is above
            it; None without one, and for the teacher and the fresh module themselves.
    """

    score: float
    spread: float | None
    runs: int
    difference: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Row:
    """One start. ``p``: of the paired test against the fresh module (``paired_p``)."""

    start: str
    entries: dict[str, Entry]
    p: float | None = None


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
        labels = {0: "no labels", "all": "all labels"}.get(self.budget, f"{self.budget} labels")
        return f"{self.teacher} → {self.student}, {self.module}, {self.task}, {labels} ({self.metric})"


@dataclass
class _Group:
    """Scores of one table: start -> language -> seed -> score."""

    metric: str = ""
    scores: dict[str, dict[str, dict[Any, float]]] = field(default_factory=dict)

    def add(self, start: str, language: str, seed: Any, value: float) -> None:
        self.scores.setdefault(start, {}).setdefault(language, {})[seed] = value


def finished(cells: Iterable[Cell], out: Path) -> list[dict[str, Any]]:
    """The records of the cells that are done."""
    return [read_json(result_path(out, cell.id)) for cell in cells if result_path(out, cell.id).exists()]


def result_tables(records: Sequence[Mapping[str, Any]]) -> list[ResultTable]:
    """All tables of the records: one without labels and one for each budget, by pair, module and task."""
    students = [record for record in records if record["kind"] == "student"]
    grafted = [record["names"] for record in students if record["names"]["start"] != FRESH]
    pairs = list(dict.fromkeys((names["teacher"], names["student"]) for names in grafted))
    groups: dict[tuple[Any, ...], _Group] = {}
    for record in students:
        names, result = record["names"], record["result"]
        for teacher, student in pairs:
            if names["student"] != student or names.get("teacher", teacher) != teacher:
                continue  # a fresh module belongs to every teacher of its student
            values = {0: result["before"], names["budget"]: result["score"]}
            for budget, value in values.items():
                key = (teacher, student, names["module"], names["task"], budget)
                group = groups.setdefault(key, _Group(result["metric"]))
                group.add(names["start"], names["language"], names["seed"], value)
    for record in records:
        if record["kind"] == TEACHER:
            names = record["names"]
            for key, group in groups.items():
                if key[0] == names["teacher"] and key[2:4] == (names["module"], names["task"]):
                    group.add(TEACHER, names["language"], None, record["result"]["score"])
    order = {0: -1.0, "all": math.inf}
    keys = sorted(groups, key=lambda key: (*map(str, key[:4]), order.get(key[4], key[4])))
    return [_table(key, groups[key]) for key in keys if set(groups[key].scores) - {FRESH, TEACHER}]


def _table(key: tuple[Any, ...], group: _Group) -> ResultTable:
    starts = [name for name in (TEACHER, FRESH) if name in group.scores]
    starts += sorted(set(group.scores) - {TEACHER, FRESH})
    # Means are over the languages in which everything is there, so that rows can be compared.
    common = sorted(set.intersection(*(set(group.scores[start]) for start in starts)))
    languages = sorted({language for scores in group.scores.values() for language in scores})
    rows = []
    for start in starts:
        entries = {
            language: _entry(group, start, [language]) for language in languages if language in group.scores[start]
        }
        if common:
            entries[MEAN] = _entry(group, start, common)
        rows.append(Row(start, entries, None if start in (TEACHER, FRESH) else paired_p(group.scores, start)))
    teacher, student, module, task, budget = key
    return ResultTable(teacher, student, module, task, budget, group.metric, languages, rows)


def _entry(group: _Group, start: str, languages: Sequence[str]) -> Entry:
    def mean_of(name: str) -> tuple[float, float | None, int] | None:
        by_language = [group.scores.get(name, {}).get(language, {}) for language in languages]
        if not all(by_language):
            return None
        seeds = set.intersection(*(set(scores) for scores in by_language))
        means = [statistics.fmean(scores[seed] for scores in by_language) for seed in seeds]
        overall = statistics.fmean(statistics.fmean(scores.values()) for scores in by_language)
        return overall, statistics.stdev(means) if len(means) > 1 else None, sum(map(len, by_language))

    own = mean_of(start)
    assert own is not None
    fresh, teacher = mean_of(FRESH), mean_of(TEACHER)
    if start in (FRESH, TEACHER) or fresh is None:
        return Entry(*own)
    share = share_of_gain(own[0], fresh[0], teacher[0]) if teacher else None
    return Entry(*own, difference=own[0] - fresh[0], share=share)


def paired_p(scores: Mapping[str, Mapping[str, Mapping[Any, float]]], start: str) -> float | None:
    """Two-sided Wilcoxon signed-rank test of a start against the fresh module, paired by language and seed.

    None with fewer than six pairs that differ, with which no difference could be significant at 5 %.
    """
    from scipy.stats import wilcoxon

    fresh = scores.get(FRESH, {})
    differences = [
        value - fresh[language][seed]
        for language, by_seed in scores[start].items()
        for seed, value in by_seed.items()
        if seed in fresh.get(language, {})
    ]
    if sum(difference != 0 for difference in differences) < 6:
        return None
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
    """Header and rows of text: languages, mean, difference from fresh, share of the gain, p."""
    several = len(table.languages) > 1
    header = ["", *table.languages, *([MEAN] if several else []), "Δ fresh", "share of the gain", "p"]
    lines = []
    for row in table.rows:
        last = row.entries.get(MEAN)
        cells = [cell_text(row.entries.get(language)) for language in table.languages]
        lines.append([
            row.start, *cells, *([cell_text(last)] if several else []),
            "" if last is None or last.difference is None else f"{100 * last.difference:+.1f}",
            cell_text(last, share=True), "" if row.p is None else f"{row.p:.2g}",
        ])  # fmt: skip
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
        rows = [" & ".join(map(_tex, line)) + r" \\" for line in lines]
        parts.append("\n".join([
            r"\begin{table}", rf"\caption{{{_tex(table.title)}}}", rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule", " & ".join(map(_tex, header)) + r" \\", r"\midrule", *rows, r"\bottomrule",
            r"\end{tabular}", r"\end{table}",
        ]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    for plain, escaped in (("\\", r"\textbackslash "), ("%", r"\%"), ("_", r"\_"), ("&", r"\&"), ("#", r"\#"),
                           ("±", r"$\pm$"), ("→", r"$\rightarrow$"), ("Δ", r"$\Delta$ ")):  # fmt: skip
        text = text.replace(plain, escaped)
    return text


def comma_separated(tables: Sequence[ResultTable]) -> str:
    """Every entry of every table as one line of CSV."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["teacher", "student", "module", "task", "budget", "metric", "start", "language", "score", "spread",
                     "runs", "difference", "share_of_gain", "p"])  # fmt: skip
    for table in tables:
        for row in table.rows:
            for language, entry in row.entries.items():
                writer.writerow([table.teacher, table.student, table.module, table.task, table.budget, table.metric,
                                 row.start, language, entry.score, entry.spread, entry.runs, entry.difference,
                                 entry.share, row.p if language == MEAN else None])  # fmt: skip
    return sink.getvalue()


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


def draw_curves(records: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Validation score over training steps, the mean over languages and seeds, a figure for each pair, module and task.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError("matplotlib is not installed", fix="pip install 'peft-graft[study]'") from error
    students = [record for record in records if record["kind"] == "student" and record["result"].get("curve")]
    panels: dict[tuple[str, ...], dict[Any, dict[str, list[list[list[float]]]]]] = {}
    for record in students:
        names = record["names"]
        panel = panels.setdefault((names["student"], names["module"], names["task"]), {})
        panel.setdefault(names["budget"], {}).setdefault(names["start"], []).append(record["result"]["curve"])
    written = []
    for key, budgets in panels.items():
        figure = Figure(figsize=(4.5 * len(budgets), 3.4), layout="constrained")
        for index, (budget, starts) in enumerate(budgets.items()):
            axes = figure.add_subplot(1, len(budgets), index + 1)
            for start, curves in sorted(starts.items(), key=lambda item: (item[0] != FRESH, item[0])):
                shortest = min(map(len, curves))
                steps = [statistics.fmean(curve[at][0] for curve in curves) for at in range(shortest)]
                scores = [statistics.fmean(curve[at][1] for curve in curves) for at in range(shortest)]
                axes.plot(steps, scores, label=start, marker=".", linestyle="--" if start == FRESH else "-")
            axes.set(title=f"{budget} labels", xlabel="steps", ylabel="validation score")
            axes.legend(fontsize="small")
        figure.suptitle(", ".join(key))
        plain = "".join(char if char.isalnum() or char in "-." else "_" for char in "-".join(key))
        for suffix in ("png", "svg"):
            path = folder / f"curves-{plain}.{suffix}"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written
