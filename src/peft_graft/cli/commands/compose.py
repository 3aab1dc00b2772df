"""The command ``compose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import peft_graft
from peft_graft.cli.display import show_alignment
from peft_graft.cli.late import command
from peft_graft.cli.output import give


@command
def compose(
    first: Annotated[str, typer.Argument(help="An alignment of A with B: folder or hub id.")],
    second: Annotated[str, typer.Argument(help="An alignment of B with C, by the same method.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write; it must not exist.", rich_help_panel="Output")
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Replace --out if it exists.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Make of two alignments, A with B and B with C, the one of A with C; no model is run.

    Example:
        peft-graft compose out/A-to-B out/B-to-C -o out/A-to-C
    """
    found = peft_graft.Alignment.compose(*map(peft_graft.Alignment.from_pretrained, (first, second)))
    found.save_pretrained(out, force=force)
    from peft_graft.cli.results import AlignResult

    give(AlignResult.of(found, out), lambda: show_alignment(found, out))
