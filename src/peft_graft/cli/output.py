"""Results as JSON on standard output."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def print_json(value: BaseModel) -> None:
    """Print a result, with the codes in it shown and not sent to the terminal."""
    import json

    from peft_graft.files import json_text

    text = json_text(value.model_dump(mode="json"), "--json", indent=2)
    codes = {letter for letter in text if not letter.isprintable() and letter != "\n"}  # which a terminal would obey
    sys.stdout.write(text.translate({ord(letter): json.dumps(letter)[1:-1] for letter in codes}) + "\n")
