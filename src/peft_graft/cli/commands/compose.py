"""The command ``compose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import peft_graft
from peft_graft.cli.display import show_alignment
from peft_graft.cli.late import command
from peft_graft.cli.output import Json


@command
def compose(
    first: Annotated[str, typer.Argument(help="An alignment of A with B: folder or hub id.")],
    second: Annotated[str, typer.Argument(help="An alignment of B with C, by the same method.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Make of two alignments, A with B and B with C, the one of A with C; no model is run."""
    found = peft_graft.Alignment.compose(*map(peft_graft.Alignment.from_pretrained, (first, second)))
    found.save_pretrained(out, force=force)
    show_alignment(found, out, as_json=as_json)
