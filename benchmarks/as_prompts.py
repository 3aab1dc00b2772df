"""A labelled task of sentences as one of generated text: columns become the lines of a prompt, the label its answer.

    python benchmarks/as_prompts.py sick/en/train.parquet data/sick/en/train.jsonl --columns premise,hypothesis

writes prompts such as "Premise: A girl is asleep\\nHypothesis: A girl is waking up" with the answer "contradiction".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peft_graft.alignment.text import load_rows
from peft_graft.outputs import write_aside


def main() -> None:
    """Read, rewrite, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a file or a data set of the hub")
    parser.add_argument("out", type=Path, help="a .jsonl file; its folder is made")
    parser.add_argument("--columns", required=True, help="of the text, with commas between")
    parser.add_argument("--label", default="label")
    args = parser.parse_args()
    columns, rows = args.columns.split(","), load_rows(args.source)

    def as_prompt(row: dict) -> dict:
        lines = [f"{name.capitalize()}: {row[name]}" for name in columns]
        return {"prompt": "\n".join(lines), "completion": str(row[args.label])}

    lines = (json.dumps(as_prompt(row), ensure_ascii=False) + "\n" for row in rows)
    write_aside(args.out, "".join(lines), force=True)
    print(f"{len(rows)} prompts in {args.out}")


if __name__ == "__main__":
    main()
