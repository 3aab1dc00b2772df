"""Tables of the quality benchmark, from the run files alone.

    python benchmarks/quality/report.py RUNS TEACHERS [--ablation FOLDER] [--markdown FILE] [--curves FILE]

RUNS holds the JSON files of run.py, TEACHERS those of the teachers, FOLDER those of ablation.py. Prints the summary
that the default is judged by, a table for each pair and task, and the ablation; ``--markdown`` puts them between the
marks of a page, ``--curves`` draws how the polish comes nearer to the teacher.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from cells import PAIRS
from scipy.stats import spearmanr

from peft_graft.study.comparison import share_of_gain

ORDER = ("fresh", "copy", "prune-align", "fitted, no polish", "half polish", "polish from fresh", "default",
         "default, distilling")  # fmt: skip
BUDGETS = (0, 100, 1000, None)
FEW = (0, 100, 1000)
MARKS = ("<!-- tables -->", "<!-- /tables -->")


@dataclass
class Cell:
    """One start of a pair and task at one label budget, beside the fresh module at the same budget."""

    pair: str
    task: str
    start: str
    budget: int | None
    runs: list
    fresh: list
    teacher: float
    majority: float

    @property
    def mean(self) -> float:
        return statistics.fmean(scores(self.runs))

    @property
    def base(self) -> float:
        return statistics.fmean(scores(self.fresh))

    @property
    def share(self) -> float | None:
        return share_of_gain(self.mean, self.base, self.teacher)

    @property
    def kept(self) -> float:
        """Share of the teacher's score over the majority class."""
        return (self.mean - self.majority) / (self.teacher - self.majority)

    @property
    def agreement(self) -> float | None:
        found = [run["graft"]["verdict"].get("measured") for run in self.runs]
        return statistics.fmean(one["agreement"] for one in found) if all(found) else None

    @property
    def standard_error(self) -> float | None:
        """Of the difference of the means; a single run is taken to spread as the other side's."""
        known = [statistics.variance(v) for v in (scores(self.runs), scores(self.fresh)) if len(v) > 1]
        if not known:
            return None
        variances = [
            statistics.variance(v) / len(v) if len(v) > 1 else max(known)
            for v in (scores(self.runs), scores(self.fresh))
        ]
        return math.sqrt(sum(variances))


def scores(runs: list) -> list[float]:
    return [run["score"] for run in runs]


def load(runs: Path, teachers: Path) -> list[Cell]:
    found = defaultdict(list)
    for path in sorted(runs.glob("*.json")):
        run = json.loads(path.read_text())
        found[run["owner"], run["task"], run["start"], run["budget"]].append(run)
    cells = []
    for (owner, task, start, budget), mine in found.items():
        if owner in PAIRS:
            models = PAIRS[owner]
            record = json.loads((teachers / f"{models.teacher}-{task}{models.mark}.json").read_text())
            fresh = found.get((f"{models.student}{models.mark}", task, "fresh", budget), [])
            cells.append(Cell(owner, task, start, budget, mine, fresh, record["test"], record["majority"]))
    return cells


def title(pair: str) -> str:
    models = PAIRS[pair]
    return f"{models.teacher} → {models.student}{', Pfeiffer adapter' if models.mark else ''}"


def mean_spread(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread} ({len(values)})"


def steps_to_fresh(runs: list, fresh: list) -> str:
    """Median over seeds of the first watched step at which the held-out score reaches the fresh module's last."""
    if not runs or not fresh:
        return ""
    target = statistics.fmean(run["held_out_curve"][-1][1] for run in fresh)
    steps = [next((step for step, score in run["held_out_curve"] if score >= target), math.inf) for run in runs]
    middle = statistics.median_low(steps)
    return "never" if middle == math.inf else str(middle)


def tables(cells: list[Cell]) -> list[str]:
    lines = []
    for pair, task in sorted(
        {(cell.pair, cell.task) for cell in cells}, key=lambda at: (list(PAIRS).index(at[0]), at[1])
    ):
        mine = {(cell.start, cell.budget): cell for cell in cells if (cell.pair, cell.task) == (pair, task)}
        one = next(iter(mine.values()))
        fresh = {cell.budget: cell.fresh for cell in mine.values()}
        lines += [
            "", f"### {title(pair)}, {task}", "",
            f"Teacher {one.teacher:.3f}, majority class {one.majority:.3f}.", "",
            "| student starts from | no labels | 100 | 1,000 | all | share of the gain | steps to the fresh score |",
            "|---|---|---|---|---|---|---|",
            "| fresh | " + " | ".join(mean_spread(scores(fresh.get(budget, []))) for budget in BUDGETS) + " | | |",
        ]  # fmt: skip
        for start in ORDER[1:]:
            row = {budget: mine.get((start, budget)) for budget in BUDGETS}
            if not any(row.values()):
                continue
            shares = [row[budget].share if row[budget] and row[budget].fresh else None for budget in FEW]
            shown = " / ".join("–" if share is None else f"{share:+.2f}" for share in shares)
            steps = steps_to_fresh(row[1000].runs, row[1000].fresh) if row[1000] else ""
            values = " | ".join(mean_spread(scores(row[budget].runs)) if row[budget] else "" for budget in BUDGETS)
            lines.append(f"| {start} | {values} | {shown} | {steps} |")
    return lines


def summary(cells: list[Cell]) -> list[str]:
    lines = [
        "| start | cells | below fresh by > 2 SE | above fresh, ≤ 1,000 labels | mean share of the gain, ≤ 1,000 "
        "labels | score kept without labels: NER | sentence tasks |",
        "|---|---|---|---|---|---|---|",
    ]
    for start in ORDER[1:]:
        mine = [cell for cell in cells if cell.start == start and cell.fresh]
        few = [cell for cell in mine if cell.budget in FEW]
        if not few:
            continue
        tested = [cell for cell in mine if cell.standard_error is not None]
        below = sum(cell.mean < cell.base - 2 * cell.standard_error for cell in tested)
        above = sum(cell.mean > cell.base for cell in few)
        shares = [cell.share for cell in few if cell.share is not None]
        kept = [
            [cell.kept for cell in few if cell.budget == 0 and (cell.task == "ner") == words] for words in (True, False)
        ]
        shown = [f"{statistics.fmean(values):.2f}" if values else "" for values in kept]
        share = f"{statistics.fmean(shares):+.2f}" if shares else ""
        counts = f"{len(mine)} | {below} of {len(tested)} | {above} of {len(few)}"
        lines.append(f"| {start} | {counts} | {share} | {' | '.join(shown)} |")
    lines += ["", *halves(cells), *verdicts(cells)]
    return lines


def halves(cells: list[Cell]) -> list[str]:
    """Half the polish from a graft against the whole from a fresh module, at the same number of seeds."""
    scores_at = {(cell.pair, cell.task, cell.start): cell.mean for cell in cells if cell.budget == 0}
    both = [
        (scores_at[pair, task, "half polish"], whole)
        for (pair, task, start), whole in scores_at.items()
        if start == "polish from fresh" and (pair, task, "half polish") in scores_at
    ]
    if not both:
        return []
    won = sum(half >= whole for half, whole in both)
    return [
        f"- half the steps from a graft reach what all of them reach from a fresh module in {won} of {len(both)} cells"
    ]


def verdicts(cells: list[Cell]) -> list[str]:
    """Whether agreement on held-out text, known before any label, predicts what a graft gains."""
    lines = []
    for budget in FEW:
        known = [(cell.agreement, cell.share) for cell in cells if cell.budget == budget and cell.fresh
                 and cell.agreement is not None and cell.share is not None]  # fmt: skip
        if len(known) > 3:
            rho = spearmanr(*zip(*known, strict=True))
            lines.append(
                "- rank correlation (Spearman) of the verdict's agreement with the share of the gain at "
                f"{budget} labels: {rho.statistic:.2f} (p = {rho.pvalue:.1g}, {len(known)} grafts)"
            )
    return lines


def draw_curves(cells: list[Cell], file: Path) -> None:
    """Divergence from the teacher on held-out text after every step of the polish, trials not counted."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "peft-graft"  # the same figure from the same runs
    from matplotlib import pyplot

    starts = ("polish from fresh", "default", "half polish")
    places = sorted({(cell.pair, cell.task) for cell in cells if cell.start == starts[0]})
    figure, axes = pyplot.subplots(1, len(places), figsize=(4.2 * len(places), 3.2), squeeze=False)
    for axis, place in zip(axes[0], places, strict=True):
        for start in starts:
            for cell in cells:
                if (cell.pair, cell.task) != place or cell.start != start or cell.budget != 0:
                    continue
                points = [(point["step"], point["divergence"]) for point in cell.runs[0]["graft"]["polish"]["curve"]]
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=start)
        axis.set(title=f"{place[0]}, {place[1]}", xlabel="steps", yscale="log")
    axes[0][0].set_ylabel("nats from the teacher")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def ablation(folder: Path) -> list[str]:
    lines = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        lines += [
            "", f"### {title(found['pair'])}, {found['task']} (teacher {found['teacher']:.3f})", "",
            "| what is moved | agreement as moved | head fitted | nats | test score, no labels |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
        for row in found["rows"]:
            moved, fitted = row["as moved"], row["head fitted"]
            lines.append(
                f"| {row['name']} | {moved['agreement']:.3f} | {fitted['agreement']:.3f} | {fitted['divergence']:.3f} "
                f"| {row['test']:.3f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("teachers", type=Path)
    parser.add_argument("--ablation", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--curves", type=Path)
    args = parser.parse_args()
    cells = load(args.runs, args.teachers)
    text = "\n".join([*summary(cells), *tables(cells), *(ablation(args.ablation) if args.ablation else [])]) + "\n"
    print(text)
    if args.curves:
        draw_curves(cells, args.curves)
    if args.markdown:
        page = args.markdown.read_text(encoding="utf-8")
        before, rest = page.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        args.markdown.write_text(f"{before}{MARKS[0]}\n{text}{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
