"""The command ``align``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import peft_graft
from peft_graft.cli.display import show_alignment
from peft_graft.cli.interrupts import saying_how_to_go_on
from peft_graft.cli.late import command
from peft_graft.cli.output import give
from peft_graft.cli.progress import watching
from peft_graft.processes import Processes

if TYPE_CHECKING:
    from peft_graft.config import AlignConfig


@command
def align(
    teacher: Annotated[str, typer.Argument(help="Folder or hub id.")],
    student: Annotated[str, typer.Argument(help="Folder or hub id.")],
    config: AlignConfig,
    text: Annotated[str, typer.Option(help="Text file or hub data set to align the models on.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write; it must not exist.", rich_help_panel="Output")
    ],
) -> None:
    """Align two models once; every module of the pair can then move with `transfer --alignment`.

    Started by torchrun or accelerate, every process runs its share of the text.

    Example:
        peft-graft align old-model new-model --text corpus.txt -o out/alignment
    """
    with watching() as callbacks, saying_how_to_go_on(out):
        found = peft_graft.align(teacher, student, text=text, out=out, config=config, callbacks=callbacks)
    if Processes.started().first:  # the others have the same to say
        from peft_graft.cli.results import AlignResult

        give(AlignResult.of(found, out), lambda: show_alignment(found, out))
