"""Tables of the quality benchmark, from the run files alone.

    python benchmarks/quality/report.py RUNS TEACHERS [--markdown FILE]

RUNS holds the JSON files of run.py, TEACHERS those of the teachers. Prints a table for each pair and task, and the
summary that the default is judged by; ``--markdown`` writes both to a file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

from cells import PAIRS
from scipy.stats import spearmanr

from peft_graft.experiments.comparison import share_of_gain

ORDER = ("fresh", "copy", "prune-align", "fitted, no polish", "half polish", "polish from fresh", "default")
BUDGETS = (0, 100, 1000, None)


def load(runs: Path) -> dict:
    """(owner, task, start, budget) -> list of runs, one for each seed."""
    found = defaultdict(list)
    for path in sorted(runs.glob("*.json")):
        run = json.loads(path.read_text())
        found[run["owner"], run["task"], run["start"], run["budget"]].append(run)
    return found


def scores(runs: list) -> list[float]:
    return [run["score"] for run in runs]


def mean_spread(values: list[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f} (1)"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f} ({len(values)})"


def steps_to_reach(runs: list, target: float | None) -> str:
    """Median over seeds of the first watched step at which the held-out score reaches the target."""
    reached = []
    for run in runs:
        curve = run.get("held_out_curve") or []
        reached.append(next((step for step, score in curve if target is not None and score >= target), math.inf))
    if not reached or target is None:
        return ""
    middle = statistics.median_low(sorted(reached))
    return "never" if middle == math.inf else str(int(middle))


def table(found: dict, teachers: Path) -> tuple[list[str], list[dict]]:
    lines, cells = [], []
    pairs_tasks = sorted(
        {(owner, task) for owner, task, _, _ in found if owner in PAIRS}, key=lambda x: (list(PAIRS).index(x[0]), x[1])
    )
    for pair, task in pairs_tasks:
        teacher_name, student = PAIRS[pair]
        teacher = json.loads((teachers / f"{teacher_name}-{task}.json").read_text())
        lines += ["", f"### {teacher_name} → {student}, {task}", "",
                  f"Teacher {teacher['test']:.3f} ({teacher['examples']} labelled examples), majority class "
                  f"{teacher['majority']:.3f}.", "",
                  "| student starts from | no labels | 100 | 1,000 | all | share of the gain at 0 / 100 / 1,000 | steps to "
                  "the fresh score at 1,000 |", "|---|---|---|---|---|---|---|"]  # fmt: skip
        fresh = {budget: found.get((student, task, "fresh", budget), []) for budget in BUDGETS}
        target = None
        if fresh[1000] and all(run.get("held_out_curve") for run in fresh[1000]):
            target = statistics.fmean(run["held_out_curve"][-1][1] for run in fresh[1000])
        for start in ORDER:
            by_budget = {b: fresh[b] if start == "fresh" else found.get((pair, task, start, b), []) for b in BUDGETS}
            if not any(by_budget.values()):
                continue
            shares = []
            for budget in BUDGETS[:3]:
                base, values = scores(fresh[budget]), scores(by_budget[budget])
                share = (
                    share_of_gain(statistics.fmean(values), statistics.fmean(base), teacher["test"])
                    if values and base
                    else None
                )
                shares.append("" if share is None or start == "fresh" else f"{share:+.2f}")
                if start != "fresh" and values and base:
                    cells.append({"pair": pair, "task": task, "start": start, "budget": budget, "values": values, "fresh": base,
                                  "share": share, "teacher": teacher["test"], "majority": teacher["majority"],
                                  "agreement": [r["graft"]["verdict"]["measured"]["agreement"] for r in by_budget[budget]
                                                if r["graft"]["verdict"].get("measured")]})  # fmt: skip
            budget = None
            base, values = scores(fresh[None]), scores(by_budget[None])
            if start != "fresh" and values and base:
                cells.append({"pair": pair, "task": task, "start": start, "budget": None, "values": values, "fresh": base,
                              "share": None, "teacher": teacher["test"], "majority": teacher["majority"], "agreement": []})  # fmt: skip
            lines.append(
                f"| {start} | "
                + " | ".join(mean_spread(scores(by_budget[b])) for b in BUDGETS)
                + f" | {' / '.join(share or '–' for share in shares) if start != 'fresh' else ''} | "
                + f"{steps_to_reach(by_budget[1000], target)} |"
            )
    return lines, cells


def standard_error(cell: dict) -> float:
    """Of the difference of the two means; with single runs on a side, its spread is taken from the other."""
    variances = [statistics.variance(v) if len(v) > 1 else None for v in (cell["values"], cell["fresh"])]
    known = [v for v in variances if v is not None]
    if not known:
        return 0.0
    variances = [v if v is not None else max(known) for v in variances]
    return math.sqrt(sum(v / len(values) for v, values in zip(variances, (cell["values"], cell["fresh"]), strict=True)))


def summary(cells: list[dict]) -> list[str]:
    lines = ["| start | cells | below fresh by more than 2 standard errors | above fresh, 0 to 1,000 labels | mean share of the "
             "gain, 0 to 1,000 labels | no labels, over the majority class: NER | sentence tasks |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for start in ORDER[1:]:
        mine = [cell for cell in cells if cell["start"] == start]
        if not mine:
            continue
        few = [cell for cell in mine if cell["budget"] is not None]
        below = sum(statistics.fmean(c["values"]) < statistics.fmean(c["fresh"]) - 2 * standard_error(c) for c in mine)
        above = sum(statistics.fmean(c["values"]) > statistics.fmean(c["fresh"]) for c in few)
        shares = [cell["share"] for cell in few if cell["share"] is not None]
        kept = {True: [], False: []}
        for cell in few:
            if cell["budget"] == 0:
                kept[cell["task"] == "ner"].append(
                    (statistics.fmean(cell["values"]) - cell["majority"]) / (cell["teacher"] - cell["majority"])
                )
        part = {k: f"{statistics.fmean(v):.2f}" if v else "" for k, v in kept.items()}
        lines.append(f"| {start} | {len(mine)} | {below} | {above} of {len(few)} | {statistics.fmean(shares):+.2f} | "
                     f"{part[True]} | {part[False]} |" if shares else f"| {start} | {len(mine)} | {below} | | | | |")  # fmt: skip
    lines += ["", *verdicts(cells)]
    return lines


def verdicts(cells: list[dict]) -> list[str]:
    """Whether agreement on held-out text, known before any label, predicts what a graft gains."""
    lines = []
    for budget in (0, 100, 1000):
        pairs = [(statistics.fmean(c["agreement"]), c["share"]) for c in cells
                 if c["budget"] == budget and c["agreement"] and c["share"] is not None]  # fmt: skip
        if len(pairs) > 3:
            rho = spearmanr(*zip(*pairs, strict=True))
            lines.append(f"- {budget} labels: Spearman's rank correlation of the verdict's agreement with the share of the gain "
                         f"{rho.statistic:.2f} (p = {rho.pvalue:.1g}, {len(pairs)} grafts)")  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("teachers", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    lines, cells = table(load(args.runs), args.teachers)
    text = "\n".join([*summary(cells), *lines]) + "\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
