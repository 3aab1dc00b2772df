"""The command ``transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import peft_graft
from peft_graft.cli.display import show_graft
from peft_graft.cli.interrupts import saying_how_to_go_on
from peft_graft.cli.late import command
from peft_graft.cli.output import Json, print_json
from peft_graft.cli.progress import watching

if TYPE_CHECKING:
    from peft_graft.config import GraftConfig


@command
def transfer(  # what moves, from where, to where, on which text: all else is config
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a trained module of peft or adapters.")],
    config: GraftConfig,
    student: Annotated[str, typer.Option(help="Folder or hub id of the model that receives it.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    teacher: Annotated[str | None, typer.Option(help="The module's base, if its configuration is wrong.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Unlabelled text to align, fit, polish and judge on: a file or hub data set.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="In place of text, 5 to 15 example prompts: the teacher's base model makes more of them."),
    ] = None,
    alignment: Annotated[str | None, typer.Option(help="An alignment made by `peft-graft align`.")] = None,
    as_json: Json = False,
) -> None:
    """Move a trained module to another model and write an ordinary checkpoint for it."""
    with watching() as callbacks, saying_how_to_go_on(out):
        graft = peft_graft.transfer(
            adapter,
            student,
            teacher=teacher,
            text=text,
            seeds=seeds,
            alignment=alignment,
            out=out,
            config=config,
            callbacks=callbacks,
        )
    if as_json:
        print_json(graft.report)
    else:
        show_graft(graft.report, out)
