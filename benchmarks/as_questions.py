"""Requests with slots as questions with answers in the text: what is the artist? in "Play Elitsa Todorova music".

    python benchmarks/as_questions.py snips/en/train.parquet data/snips-questions/en/train.jsonl

writes a row as SQuAD has them for every request of which a slot's value stands in it once; which slot is asked for is
drawn.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from peft_graft.alignment.text import load_rows
from peft_graft.outputs import write_aside


def main() -> None:
    """Read, rewrite, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a file or a data set of the hub, with columns prompt and completion")
    parser.add_argument("out", type=Path, help="a .jsonl file; its folder is made")
    args = parser.parse_args()
    draw, rows = random.Random(0), load_rows(args.source)

    def as_question(row: dict[str, Any]) -> dict[str, Any] | None:
        text, said = row["prompt"], json.loads(row["completion"])
        slots = said.get("slots", {name: value for name, value in said.items() if name != "intent"})
        once = [(name, value) for name, value in slots.items() if isinstance(value, str) and text.count(value) == 1]
        if not once:
            return None
        name, value = draw.choice(once)
        answers = {"text": [value], "answer_start": [text.index(value)]}
        return {"question": f"What is the {name.replace('_', ' ')}?", "context": text, "answers": answers}

    found = [asked for row in rows if (asked := as_question(row))]
    lines = (json.dumps(asked, ensure_ascii=False) + "\n" for asked in found)
    write_aside(args.out, "".join(lines), force=True)
    print(f"{len(found)} questions in {args.out}")


if __name__ == "__main__":
    main()
