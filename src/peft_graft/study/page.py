"""Pages of published results: the tables between the marks of a page, made from a file of results.

    python -m peft_graft.study.page RESULTS ... PAGE [--curves FILE]

RESULTS is one file or several, written by ``peft-graft study FILE --export RESULTS``. In PAGE whatever stands between
two marks such as ``<!-- comparison: quality -->`` and ``<!-- /comparison -->`` is replaced by what the first one names,
of the study that it names: ``comparison`` (every start beside a fresh module, in full), ``scores`` (the scores alone),
``tables`` (as the study itself writes them, with the gain over the best control), ``lift`` (of language models,
``study.lift``), ``lifts`` (the same, a row for each pair and task), ``prices`` (scores beside seconds), ``ablation``
(agreement before and after the head is fitted), ``times`` (of moves by the default), ``starts`` (distances from the
teacher on the way, by where a polish began), ``pooled`` (the default less each control, over all tasks of a pair) or
``texts`` (by how many unlabelled texts a graft was made on).
``--curves`` draws how a polish approaches the teacher.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_graft.errors import GraftError, StudyError
from peft_graft.models.tasks import Task
from peft_graft.study.lift import lift, lifts, prices, times
from peft_graft.study.pooled import pooled
from peft_graft.study.results import Record, about, read_results
from peft_graft.study.spec import CONTROL, DEFAULT, FRESH, POLISHED_FRESH, Budget
from peft_graft.study.starts import starts
from peft_graft.study.tables import (
    markdown,
    mean_spread,
    pair_title,
    rank_correlation,
    result_tables,
    share_of_gain,
)
from peft_graft.study.tasks import METRICS
from peft_graft.study.texts import texts

#: Columns of the tables, and those of them whose labels are few.
BUDGETS: tuple[Budget, ...] = (0, 100, 1000, "all")
FEW: tuple[Budget, ...] = (0, 100, 1000)
#: The budget at which it is counted how many steps a start needs for what a fresh module reaches.
_WATCHED = 1000
_MARK = re.compile(r"(<!-- (\w+): ([\w.-]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
_BUDGET_NAMES: dict[Budget, str] = {0: "no labels", 1000: "1,000"}


@dataclass(frozen=True)
class Place:
    """What is compared: two models, a kind of module, and a task in one language."""

    teacher: str
    student: str
    module: str
    task: str
    language: str
    metric: str

    @property
    def title(self) -> str:
        """As headings have it."""
        return pair_title(self.teacher, self.student, self.module, self.task, self.language)


@dataclass(frozen=True)
class StudentRun:
    """One student: its score, the validation curve of its training, and the record of its graft."""

    score: float
    curve: Sequence[Sequence[float]] = ()
    graft: Record | None = None

    @property
    def agreement(self) -> float | None:
        """Of the graft with the teacher on held-out text, as its verdict has it."""
        measured = self.graft["result"]["verdict"].get("measured") if self.graft else None
        return measured["agreement"] if measured else None


@dataclass
class Entry:
    """One start at one label budget, beside the fresh module at the same budget; runs by seed."""

    place: Place
    start: str
    budget: Budget
    teacher: float
    majority: float
    runs: dict[int, StudentRun] = field(default_factory=dict)
    fresh: dict[int, StudentRun] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(_scores(self.runs))

    @property
    def base(self) -> float:
        """The fresh module's mean."""
        return statistics.fmean(_scores(self.fresh))

    @property
    def share(self) -> float | None:
        """Of what the teacher is above a fresh module."""
        return share_of_gain(self.mean, self.base, self.teacher)

    @property
    def kept(self) -> float | None:
        """Share of the teacher's score over the majority class; None where it has none."""
        return share_of_gain(self.mean, self.majority, self.teacher)

    @property
    def agreement(self) -> float | None:
        """Mean agreement of the grafts; None where one was not measured."""
        found = [run.agreement for run in self.runs.values()]
        known = [value for value in found if value is not None]
        return statistics.fmean(known) if known and len(known) == len(found) else None

    @property
    def standard_error(self) -> float | None:
        """Of the difference of the means; a single run is taken to spread as the other side's."""
        sides = (_scores(self.runs), _scores(self.fresh))
        known = [statistics.variance(values) for values in sides if len(values) > 1]
        if not known:
            return None
        return math.sqrt(
            sum(statistics.variance(values) / len(values) if len(values) > 1 else max(known) for values in sides)
        )


def _scores(runs: Mapping[int, StudentRun]) -> list[float]:
    return [run.score for run in runs.values()]


# ---- reading ---------------------------------------------------------------------------------------------------------


def entries_of(records: Sequence[Record]) -> list[Entry]:
    """Every start of every place at every budget, in the order of the records; without the fresh modules' own.

    Raises:
        StudyError: a teacher's record is missing.
    """
    by_id = {record["id"]: record for record in records}
    teachers = {about(record, "teacher"): record["result"] for record in records if record["kind"] == "teacher"}
    fresh: dict[Any, dict[int, StudentRun]] = {}
    found: dict[Any, Entry] = {}
    for record in [record for record in records if record["kind"] == "student"]:
        names, result = record["names"], record["result"]
        runs = {names["budget"]: StudentRun(result["score"], result.get("curve", ()), by_id.get(_graft_id(record)))}
        if "before" in result:
            runs.setdefault(0, StudentRun(result["before"], graft=by_id.get(_graft_id(record))))
        for budget, run in runs.items():
            if names["start"] == FRESH:
                fresh.setdefault((about(record, "student"), budget), {})[names["seed"]] = run
                continue
            teacher = teachers.get(about(record, "teacher"))
            if teacher is None:
                raise StudyError("the results have no record of its teacher", where=record["id"])
            place = Place(
                names["teacher"], names["student"], names["module"], names["task"], names["language"], result["metric"]
            )
            new = Entry(place, names["start"], budget, teacher["score"], teacher["majority"])
            found.setdefault((place, names["start"], budget), new).runs[names["seed"]] = run
            new_key = (about(record, "student"), budget)
            found[place, names["start"], budget].fresh = fresh.setdefault(new_key, {})
    return list(found.values())


def _graft_id(record: Record) -> str | None:
    found: str | None = record.get("needs", {}).get("graft")
    return found


def _places(entries: Iterable[Entry]) -> list[Place]:
    return list(dict.fromkeys(entry.place for entry in entries))


def _starts(entries: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.start for entry in entries))


def _at(
    place: Place, entries: Iterable[Entry]
) -> tuple[dict[tuple[str, Budget], Entry], dict[Budget, dict[int, StudentRun]], Entry]:
    """A place's entries by start and budget, its fresh modules by budget, and one of the entries."""
    mine = {(entry.start, entry.budget): entry for entry in entries if entry.place == place}
    return mine, {entry.budget: entry.fresh for entry in mine.values()}, next(iter(mine.values()))


# ---- tables ----------------------------------------------------------------------------------------------------------


def comparison(records: Sequence[Record]) -> list[str]:
    """The summary by start, what the verdict predicted, and a table for each place."""
    entries = entries_of(records)
    return [*summary(entries), "", *halves(entries), *verdicts(entries), *full_tables(entries)]


def summary(entries: Sequence[Entry]) -> list[str]:
    """One row for every start: how often it is above or below a fresh module, and what it keeps of the teacher."""
    lines = [
        "| start | cells | below fresh by > 2 SE | above fresh, ≤ 1,000 labels | mean share of the gain, ≤ 1,000 "
        "labels | score kept without labels: NER | sentence tasks |",
        "|---|---|---|---|---|---|---|",
    ]
    words = METRICS[Task.TOKEN_CLASSIFICATION]
    for start in _starts(entries):
        mine = [entry for entry in entries if entry.start == start and entry.fresh]
        few = [entry for entry in mine if entry.budget in FEW]
        if not few:
            continue
        errors = [(entry, error) for entry in mine if (error := entry.standard_error) is not None]
        below = sum(entry.mean < entry.base - 2 * error for entry, error in errors)
        above = sum(entry.mean > entry.base for entry in few)
        shares = [share for entry in few if (share := entry.share) is not None]
        kept = [
            [
                kept
                for entry in few
                if entry.budget == 0 and (entry.place.metric in words) == of_words and (kept := entry.kept) is not None
            ]
            for of_words in (True, False)
        ]
        shown = [f"{statistics.fmean(values):.2f}" if values else "" for values in kept]
        mean_share = f"{statistics.fmean(shares):+.2f}" if shares else ""
        counts = f"{len(mine)} | {below} of {len(errors)} | {above} of {len(few)}"
        lines.append(f"| {start} | {counts} | {mean_share} | {' | '.join(shown)} |")
    return lines


def halves(entries: Sequence[Entry]) -> list[str]:
    """Half the polish from a graft against the whole from a fresh module, at the same number of seeds."""
    half = next((start for start in _starts(entries) if start.startswith(f"{DEFAULT}, polish ")), None)
    means = {(entry.place, entry.start): entry.mean for entry in entries if entry.budget == 0}
    both = [
        (means[place, half], whole)
        for (place, start), whole in means.items()
        if half is not None and start == POLISHED_FRESH and (place, half) in means
    ]
    if not both:
        return []
    won = sum(first >= second for first, second in both)
    return [
        f"- half the steps from a graft reach what all of them reach from a fresh module in {won} of {len(both)} cells"
    ]


def verdicts(entries: Sequence[Entry]) -> list[str]:
    """Whether agreement on held-out text, known before any label, predicts what a graft gains."""
    lines = []
    for budget in FEW:
        known = [
            (agreement, share)
            for entry in entries
            if entry.budget == budget and entry.fresh and not entry.start.startswith(CONTROL)
            if (agreement := entry.agreement) is not None and (share := entry.share) is not None
        ]
        if len(known) > 3:
            lines.append(
                "- rank correlation (Spearman) of the verdict's agreement with the share of the gain at "
                f"{budget} labels: {rank_correlation(known)}"
            )
    return lines


def full_tables(entries: Sequence[Entry]) -> list[str]:
    """A table for each place: scores by budget, shares of the gain, steps to the fresh module's score."""
    lines = []
    for place in _places(entries):
        mine, fresh, one = _at(place, entries)
        header = " | ".join(_BUDGET_NAMES.get(budget, str(budget)) for budget in BUDGETS)
        lines += [
            "", f"### {place.title}", "",
            f"Teacher {one.teacher:.3f}, majority class {one.majority:.3f}.", "",
            f"| student starts from | {header} | share of the gain | steps to the fresh score |",
            "|---|---|---|---|---|---|---|",
            "| fresh | " + " | ".join(mean_spread(_scores(fresh.get(budget, {}))) for budget in BUDGETS) + " | | |",
        ]  # fmt: skip
        for start in _starts(mine.values()):
            row = [mine.get((start, budget)) for budget in BUDGETS]
            shares = [entry.share if entry and entry.fresh else None for entry in row[: len(FEW)]]
            shown = " / ".join("–" if share is None else f"{share:+.2f}" for share in shares)
            values = " | ".join(mean_spread(_scores(entry.runs)) if entry else "" for entry in row)
            watched = mine.get((start, _WATCHED))
            lines.append(f"| {start} | {values} | {shown} | {steps_to_fresh(watched) if watched else ''} |")
    return lines


def steps_to_fresh(entry: Entry) -> str:
    """Median over seeds of the first watched step at which the validation score reaches the fresh module's last."""
    if not entry.fresh or not all(run.curve for run in entry.fresh.values()):
        return ""
    target = statistics.fmean(run.curve[-1][1] for run in entry.fresh.values())
    steps = [next((step for step, score in run.curve if score >= target), math.inf) for run in entry.runs.values()]
    middle = statistics.median_low(steps)
    return "never" if middle == math.inf else str(middle)


def scores(records: Sequence[Record]) -> list[str]:
    """One table of scores: a fresh module, the published method and the default, with few labels."""
    entries = entries_of(records)
    shown = [start for start in _starts(entries) if start == DEFAULT or start.startswith("prune-align")]
    lines = [
        "| task and models | student starts from | no labels | 100 labels | 1,000 labels |",
        "|---|---|---|---|---|",
    ]
    for place in sorted(_places(entries), key=lambda place: place.metric not in METRICS[Task.TOKEN_CLASSIFICATION]):
        mine, fresh, one = _at(place, entries)
        about = f"{place.task} ({place.metric}), {place.teacher} → {place.student}"
        about += "" if place.module == "lora" else f", {place.module}"
        about += f"; teacher {one.teacher:.3f}" + (f", majority class {one.majority:.3f}" if one.majority else "")
        rows = {FRESH: [_scores(fresh.get(budget, {})) for budget in FEW]}
        for start in shown:
            found = [mine.get((start, budget)) for budget in FEW]
            if any(found):
                rows[start] = [_scores(entry.runs) if entry else [] for entry in found]
        for start, values in rows.items():
            cells = [_one_score(each, bold=start == DEFAULT) for each in values]
            lines.append(f"| {about if start == FRESH else ''} | {start.partition('/')[0]} | {' | '.join(cells)} |")
    return lines


def _one_score(values: Sequence[float], *, bold: bool) -> str:
    text = mean_spread(values, count=False)
    return f"**{text}**" if bold and text else text


def ablation(records: Sequence[Record]) -> list[str]:
    """What every candidate moved is worth before and after the head is fitted, a table for each place."""
    lines = []
    by_id = {record["id"]: record for record in records}
    entries = [entry for entry in entries_of(records) if entry.budget == 0]
    for place in _places(entries):
        mine = [entry for entry in entries if entry.place == place]
        lines += [
            "", f"### {place.title} (teacher {mine[0].teacher:.3f})", "",
            "| what is moved | agreement as moved | head fitted | nats | test score, no labels |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
        for entry in mine:
            run = next(iter(entry.runs.values()))
            assert run.graft is not None
            tried = by_id[run.graft["id"]]["result"]["tried"]
            moved, fitted = (next(value for name, value in tried.items() if name.endswith(ending))
                             for ending in (", as moved", ", head fitted"))  # fmt: skip
            name = entry.start.removesuffix(", head fit")
            lines.append(
                f"| {name} | {_agreement(moved)} | {_agreement(fitted)} | {fitted['divergence']:.3f} "
                f"| {entry.mean:.3f} |"
            )
    return lines


def _agreement(found: Mapping[str, Any]) -> str:
    """To three places; nothing where it is not defined."""
    return "" if found["agreement"] is None else f"{found['agreement']:.3f}"


# ---- pages -----------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Sequence[Record]], list[str]]] = {
    "comparison": comparison,
    "scores": scores,
    "lift": lift,
    "lifts": lifts,
    "prices": prices,
    "ablation": ablation,
    "tables": lambda records: markdown(result_tables(records)).splitlines(),
    "times": times,
    "starts": starts,
    "pooled": pooled,
    "texts": texts,
}


def render(page: str, records: Sequence[Record]) -> str:
    """A page with what stands between its marks made anew.

    Raises:
        StudyError: a mark asks for something that there is not.
    """

    def part(match: re.Match[str]) -> str:
        what, study = match[2], match[3]
        mine = [record for record in records if record.get("study") in (study, "teachers")]
        if what not in PARTS:
            raise StudyError("unknown mark", where=match[1].strip(), expected=", ".join(PARTS))
        if not any(record["kind"] == "student" for record in mine):
            raise StudyError("the results have no student of this study", where=match[1].strip())
        return match[1] + "\n".join(PARTS[what](mine)).strip() + "\n" + match[4]

    return _MARK.sub(part, page)


def draw_curves(records: Sequence[Record], file: Path) -> None:
    """Divergence from the teacher on held-out text over the polish, where a fresh module was polished too."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "peft-graft"  # the same figure from the same runs
    entries = [entry for entry in entries_of(records) if entry.budget == 0]
    places = sorted({entry.place for entry in entries if entry.start == POLISHED_FRESH}, key=lambda place: place.title)
    figure = Figure(figsize=(4.2 * len(places), 3.2), layout="tight")
    for index, place in enumerate(places):
        axis = figure.add_subplot(1, len(places), index + 1)
        for entry in entries:
            run = next(iter(entry.runs.values()))
            polish = run.graft["result"].get("polish") if run.graft else None
            if entry.place == place and polish and "distilling" not in entry.start:
                points = [(point["step"], point["divergence"]) for point in polish["curve"]]
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=entry.start)
        axis.set(title=place.title, xlabel="steps", yscale="log")
        axis.title.set_fontsize("small")
        if index == 0:
            axis.set_ylabel("nats from the teacher")
            axis.legend()
    figure.savefig(file, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_graft.study.page", description="Make the tables of a page anew from published results."
    )
    parser.add_argument("results", type=Path, nargs="+", help="files that `peft-graft study --export` wrote")
    parser.add_argument("page", type=Path, help="the page, with marks such as <!-- comparison: quality -->")
    parser.add_argument("--curves", type=Path, help="draw the polish's curves into this file")
    given = parser.parse_args(arguments)
    try:
        records = [record for path in given.results for record in read_results(path)]
        given.page.write_text(render(given.page.read_text(encoding="utf-8"), records), encoding="utf-8")
        if given.curves:
            draw_curves([record for record in records if record.get("study") != "ablation"], given.curves)
    except (GraftError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
