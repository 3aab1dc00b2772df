"""The command ``evaluate``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import peft_graft
from peft_graft.cli.display import show_evaluation
from peft_graft.cli.interrupts import saying_how_to_go_on
from peft_graft.cli.late import command
from peft_graft.cli.output import give
from peft_graft.cli.progress import watching

if TYPE_CHECKING:
    from peft_graft.config import EvaluateConfig


@command
def evaluate(
    graft: Annotated[str, typer.Argument(help="Folder or hub id of a graft, or of a module of peft.")],
    config: EvaluateConfig,
    text: Annotated[str, typer.Option(help="Prompts with answers: a file or hub data set.")],
    metric: Annotated[
        str, typer.Option(help="exact, accuracy, json-f1, token-f1, rouge, bleu or nll; several with commas.")
    ] = "exact",
    teacher: Annotated[str | None, typer.Option(help="The teacher's model, if it is not where it was.")] = None,
    student: Annotated[str | None, typer.Option(help="The student, if it is not where it was.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="JSON file to write, with all answers; it must not exist.", rich_help_panel="Output"
        ),
    ] = None,
) -> None:
    """Score what a graft answers, beside its student without it and the teacher, against answers that are known.

    Example:
        peft-graft evaluate out/graft --text labelled.jsonl --metric exact,rouge
    """
    names = [name.strip() for name in metric.split(",")]
    with watching() as callbacks, saying_how_to_go_on(out) if out else nullcontext():
        found = peft_graft.evaluate(
            graft,
            text=text,
            metrics=names,
            teacher=teacher,
            student=student,
            out=out,
            config=config,
            callbacks=callbacks,
        )
    from peft_graft.cli.results import EvaluateResult

    give(EvaluateResult.at(found, out), lambda: show_evaluation(found, out))
