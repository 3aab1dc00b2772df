"""What scripts share that train a model briefly on plain text: the text, and how the model is kept."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft_graft.alignment.text import load_rows
from peft_graft.outputs import written_aside


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all of them take."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model")
    found.add_argument("out", type=Path)
    found.add_argument("--text", required=True, help="a file with a column of text, or of lists of words")
    found.add_argument("--column", default="tokens")
    found.add_argument("--batch-size", type=int, default=16)
    return found


def texts(args: argparse.Namespace) -> list[str]:
    """The column, words put together."""
    values = (row[args.column] for row in load_rows(args.text))
    return [value if isinstance(value, str) else " ".join(value) for value in values]


def keep(model: Any, tokenizer: Any, out: Path) -> None:
    """Write both in place of what is there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out, force=True) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
