"""Tables of the speed benchmark, from the files of run.py alone.

    python benchmarks/speed/report.py RUNS [--markdown FILE]

Prints them; ``--markdown`` puts them between the marks of a page.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

MARKS = ("<!-- tables -->", "<!-- /tables -->")
#: A machine on which more than this was running when a measurement began is called busy.
QUIET = 0.5


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def median(records, key):
    return statistics.median(record[key] for record in records)


def limits(records):
    groups = defaultdict(list)
    for record in records:
        key = (record["teacher"], record["student"], len(record["sites"]), record["method"], record["device"],
               record["dtype"])  # fmt: skip
        groups[key].append(record)
    rows = [
        [
            f"{teacher} -> {student}", "query, value" if sites == 2 else "all linear", method, f"{device} {dtype}",
            f"{median(runs, 'forwards'):.1f}", f"{median(runs, 'products'):.1f}", f"{median(runs, 'wall'):.1f}",
            f"{median(runs, 'over_limit'):.2f}", f"{median(runs, 'over_forwards'):.2f}", len(runs),
        ]
        for (teacher, student, sites, method, device, dtype), runs in sorted(groups.items())
    ]  # fmt: skip
    header = ["pair", "sites", "method", "device", "forwards, s", "products, s", "align, s", "over limit",
              "over forwards", "runs"]  # fmt: skip
    return table(header, rows)


def stages(records):
    rows = [
        [f"{r['student_units']} x {r['teacher_units']}", f"{r['tokens']:,}", f"{r['plain']:.1f} ({r['plain_way']})",
         f"{r['ours']:.2f}", f"{r['speedup']:.0f}", "same" if r["same_indices"] else "DIFFERENT"]
        for r in records
    ]  # fmt: skip
    return table(["units", "tokens", "straightforward, s", "ours, s", "times faster", "indices"], rows)


def memories(records):
    records = sorted(records, key=lambda record: record["tokens"])
    least = records[0]["peak_mib"]
    return table(
        ["tokens", "peak memory, MiB", "over the first", "align, s"],
        [[f"{r['tokens']:,}", f"{r['peak_mib']:.0f}", f"{r['peak_mib'] / least - 1:+.1%}", f"{r['wall']:.0f}"]
         for r in records],
    )  # fmt: skip


def growths(records):
    """Seconds along each axis from the common point, and the exponent of a power law through them."""
    rows = []
    common = {"width": 256, "depth": 4, "tokens": 20_000, "sites": 2}
    for axis in common:
        line = sorted(
            (r for r in records if all(r[other] == value for other, value in common.items() if other != axis)),
            key=lambda record: record[axis],
        )
        if len(line) > 1:
            for part in ("pass", "solve"):
                points = [(math.log(r[axis]), math.log(max(r[part], 1e-9))) for r in line]
                exponent = statistics.linear_regression(*zip(*points, strict=True)).slope
                shown = ", ".join(f"{r[axis]:,}: {r[part]:.2f}" for r in line)
                rows.append([axis, part, shown, f"{exponent:.2f}"])
    return table(["in", "stage", "seconds", "exponent"], rows)


def processes(records):
    groups = defaultdict(list)
    for record in records:
        groups[record["name"].split()[1]].append(record)
    imports = median(groups["imports"], "process_time") if "imports" in groups else 0.0
    said = {
        "adapter": "Pfeiffer adapter, L6 -> L3, 1,000 sentences, no polish",
        "adapter-bfloat16": "the same in bfloat16",
        "transfer": "LoRA, L6 -> L3, 1,000 sentences, no polish",
        "bfloat16": "the same in bfloat16",
        "aligned": "second module of an aligned pair, LoRA, L6 -> E5",
        "imports": "imports alone",
    }
    rows = [
        [said[name], f"{median(runs, 'wall'):.1f}", f"{median(runs, 'process_time'):.1f}",
         f"{median(runs, 'process_time') - imports:.1f}", len(runs)]
        for name, runs in ((name, groups[name]) for name in said if name in groups)
    ]  # fmt: skip
    return table(["command", "wall, s", "process time, s", "beyond imports, s", "runs"], rows)


def assignments(records):
    """Seconds of every solver, and whether all found the same sum of correlations."""
    records = sorted(records, key=lambda record: (not record["related"], record["units"]))
    names = sorted({name for record in records for name in record["seconds"]})
    return table(
        ["units", "correlations with", *(f"{name}, s" for name in names), "sums"],
        [
            [f"{r['units']:,}", "a noisy copy" if r["related"] else "another model",
             *(f"{r['seconds'][name]:.2f}" if name in r["seconds"] else "" for name in names),
             "same" if max(r["sums"].values()) - min(r["sums"].values()) < 1e-6 * r["units"] else "DIFFERENT"]
            for r in records
        ],
    )  # fmt: skip


def needed_tokens(records):
    """Correlation on other text by tokens, and of which kind of space the least is kept of what most tokens give."""
    records = sorted(records, key=lambda record: (record["dtype"] != "float32", record["tokens"]))
    best = max((r for r in records if r["dtype"] == "float32"), key=lambda record: record["tokens"])["matched"]
    rows = []
    for r in records:
        kept = {name: value / best[name] for name, value in r["matched"].items()}
        worst = min(kept, key=kept.get)
        rows.append([f"{r['tokens']:,}", r["dtype"], f"{statistics.fmean(r['matched'].values()):.4f}",
                     f"{statistics.fmean(kept.values()):.1%}", f"{kept[worst]:.1%} ({worst})"])  # fmt: skip
    return table(["tokens", "forwards in", "correlation on other text", "kept", "least kept"], rows)


PARTS = (
    ("limit", "Alignment over its limit", limits),
    ("stage", "Statistics and assignment", stages),
    ("assignment", "Solvers of the assignment", assignments),
    ("memory", "Peak memory", memories),
    ("growth", "Growth", growths),
    ("tokens", "Tokens that an assignment needs", needed_tokens),
    ("process", "Whole commands", processes),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    groups = defaultdict(list)
    for path in sorted(args.runs.glob("*.json")):
        record = json.loads(path.read_text())
        groups[record["name"].split()[0]].append(record)
    blocks = [f"### {title}\n\n{make(groups[part])}" for part, title, make in PARTS if groups[part]]
    records = [record for group in groups.values() for record in group]
    if records:
        first = records[0]
        machine = f"{first['processor']}, {first['hardware']['cpus']} CPUs, {first['hardware']['threads']} threads"
        used = f"Python {first['versions']['python']}, torch {first['versions']['torch']}"
        # Our own run leaves its threads in the load, so the first measurement is what tells.
        other = min(record["load_before"] for record in records)
        busy = " **The machine was busy with other work**, so the seconds are rough." if other > QUIET else ""
        blocks.insert(0, f"{machine}; {used}.{busy}")
    text = "\n\n".join(blocks)
    print(text)
    if args.markdown:
        page = args.markdown.read_text()
        before, rest = page.split(MARKS[0])
        args.markdown.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
