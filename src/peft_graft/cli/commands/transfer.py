"""The command ``transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import peft_graft
from peft_graft.cli.display import show_graft, show_shelf
from peft_graft.cli.interrupts import continued, saying_how_to_go_on
from peft_graft.cli.late import command
from peft_graft.cli.output import Json, print_json
from peft_graft.cli.progress import watching

if TYPE_CHECKING:
    from peft_graft.config import GraftConfig


@command
def transfer(  # what moves, from where, to where, on which text: all else is config
    config: GraftConfig,
    student: Annotated[str, typer.Option(help="Folder or hub id of the model that receives it.")],
    out: Annotated[
        Path, typer.Option(help="Folder to write; it must not exist. Of several modules, the folder of their grafts.")
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="Folders or hub ids of trained modules of peft or adapters.", show_default=False),
    ] = None,
    listed: Annotated[
        Path | None,
        typer.Option("--list", help="More modules, one a line; or JSON: adapter, and name, teacher, text or seeds."),
    ] = None,
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
    """Move a trained module to another model and write an ordinary checkpoint for it.

    Several modules move one after another between models that are loaded once, each into its own folder below --out.
    Grafts that are finished are kept when the same command is run again, so more modules can be added.
    """
    if listed is not None or len(adapters or []) != 1:
        from peft_graft.shelf import ShelfModule, read_list

        named = [ShelfModule(adapter=adapter) for adapter in adapters or []]
        modules = named + (read_list(listed) if listed else [])
        with continued("finished grafts are kept"), watching() as callbacks:
            report = peft_graft.transfer_all(
                modules,
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
            print_json(report)
        else:
            show_shelf(report, out)
        if report.failed:
            raise typer.Exit(1)
        return
    with watching() as callbacks, saying_how_to_go_on(out):
        graft = peft_graft.transfer(
            (adapters or [])[0],
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
