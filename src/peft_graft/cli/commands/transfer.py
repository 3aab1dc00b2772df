"""The command ``transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import peft_graft
from peft_graft.cli.display import show_shelf
from peft_graft.cli.interrupts import continued, saying_how_to_go_on
from peft_graft.cli.late import command
from peft_graft.cli.output import give, say_if_quiet
from peft_graft.cli.progress import watching
from peft_graft.cli.result import show_graft
from peft_graft.errors import PlanError
from peft_graft.hub import check_repository
from peft_graft.processes import Processes

if TYPE_CHECKING:
    from peft_graft.config import GraftConfig


@command
def transfer(  # what moves, from where, to where, on which text: all else is config
    config: GraftConfig,
    student: Annotated[str, typer.Option(help="Folder or hub id of the model that receives it.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="New folder to write; of several modules, for all.",
            rich_help_panel="Output",
        ),
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="Folders or hub ids of trained modules of peft or adapters.", show_default=False),
    ] = None,
    listed: Annotated[
        Path | None,
        typer.Option("--list", help="More modules, one a line; or JSON: adapter, and name, teacher, text or seeds."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Where the module's base is now, if it has moved.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Unlabelled text of the task, or prompts: a file or hub data set.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="In place of text, 5 to 15 example prompts: the teacher's base model makes more of them."),
    ] = None,
    alignment: Annotated[str | None, typer.Option(help="An alignment made by `peft-graft align`.")] = None,
    push_to: Annotated[
        str | None,
        typer.Option("--push-to", help="Upload the graft to the hub too, as owner/name.", rich_help_panel="Output"),
    ] = None,
    private: Annotated[
        bool,
        typer.Option("--private", help="A repository that --push-to makes is private.", rich_help_panel="Output"),
    ] = False,
) -> None:
    """Move a trained module to another model and write an ordinary checkpoint for it.

    Each of several modules moves into its own folder below --out; models are loaded once, or by each with --ray.
    Finished grafts are kept when it is run again.

    Example:
        peft-graft transfer my-lora --student Qwen/Qwen3-4B --text prompts.jsonl -o out/graft
    """
    named = adapters or []
    options: dict[str, Any] = {
        "teacher": teacher,
        "text": text,
        "seeds": seeds,
        "alignment": alignment,
        "config": config,
    }
    if listed is not None or len(named) != 1:
        if push_to:
            raise PlanError(
                "one repository takes one graft", where="--push-to", found="several modules", fix="push each by itself"
            )
        _transfer_all(named, listed, student, out, **options)
        return
    if push_to:
        check_repository(push_to, config.token)
    with watching(plan=True) as callbacks, saying_how_to_go_on(out):
        graft = peft_graft.transfer(named[0], student, out=out, callbacks=callbacks, **options)
    if not Processes.started().first:  # which have the same to say
        return
    pushed = graft.push_to_hub(push_to, private=private or None, token=config.token) if push_to else None
    from peft_graft.cli.results import TransferResult

    result = TransferResult.at(graft.report, out).model_copy(update={"pushed": pushed})
    give(result, lambda: show_graft(graft.report, out, pushed))


def _transfer_all(adapters: list[str], listed: Path | None, student: str, out: Path, **options: Any) -> None:
    from peft_graft.cli.results import ShelfResult
    from peft_graft.shelf import ShelfModule, read_list

    modules = [ShelfModule(adapter=adapter) for adapter in adapters] + (read_list(listed) if listed else [])
    with continued("finished grafts are kept"), watching() as callbacks:
        report = peft_graft.transfer_all(modules, student, out=out, callbacks=callbacks, **options)
    give(ShelfResult.at(report, out), lambda: show_shelf(report, out))
    for one in report.failed:
        say_if_quiet(f"{one.name}: {one.error}")
    if report.failed:
        raise typer.Exit(1)
