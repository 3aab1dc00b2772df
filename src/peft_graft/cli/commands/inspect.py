"""The command ``inspect``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

import peft_graft
from peft_graft.cli.display import show_inspection
from peft_graft.cli.late import command
from peft_graft.cli.output import give, say_if_quiet

if TYPE_CHECKING:
    from peft_graft.config import GraftConfig


@command
def inspect(
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a module.")],
    config: GraftConfig,
    student: Annotated[str | None, typer.Option(help="Plan a transfer to this model, without its weights.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Where the module's base is now, if it has moved.")] = None,
    text: Annotated[str | None, typer.Option(help="The text that the transfer would be given.")] = None,
    seeds: Annotated[str | None, typer.Option(help="The examples that the transfer would make prompts from.")] = None,
    alignment: Annotated[str | None, typer.Option(help="The alignment that the transfer would be given.")] = None,
) -> None:
    """Say what a module is, where it attaches, and what would become of it on a student: no weights are loaded.

    Example:
        peft-graft inspect my-lora --student Qwen/Qwen3-4B --text prompts.jsonl
    """
    from peft_graft.cli.options import words_of  # needs pydantic, which the list of commands does not wait for

    found = peft_graft.inspect(
        adapter, student, teacher=teacher, text=text, seeds=seeds, alignment=alignment, config=config
    )
    given = {"student": student, "teacher": teacher, "text": text, "seeds": seeds, "alignment": alignment}
    words = [word for name, value in given.items() if value for word in (f"--{name}", value)] + words_of(config)
    command = shlex.join(["peft-graft", "transfer", adapter, *words, "--out", "out/graft"]) if student else None
    give(found, lambda: show_inspection(found, command))
    problems = [found.teacher_problem, found.student.problem if found.student else None]
    if any(problems):
        say_if_quiet("; ".join(problem for problem in problems if problem))
        raise typer.Exit(1)
