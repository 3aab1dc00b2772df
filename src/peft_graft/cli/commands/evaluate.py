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
    text: Annotated[
        str,
        typer.Option(
            help="Prompts with answers, texts with labels, tokens with ner_tags, or SQuAD: a file or hub data set."
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            help="Of prompts exact, accuracy, json-f1, token-f1, rouge, bleu or nll; of classes accuracy, entity-f1, "
            "macro-f1, micro-f1 or exact; of numbers pearson or rmse; of questions exact-match or token-f1. Several "
            "with commas; the usual ones by default."
        ),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Where the teacher's model is now, if it has moved.")] = None,
    student: Annotated[str | None, typer.Option(help="Where the student is now, if it has moved.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="JSON file to write, with all answers; it must not exist.", rich_help_panel="Output"
        ),
    ] = None,
) -> None:
    """Score a graft on labelled text, beside the teacher: what it answers, its classes or its numbers.

    Example:
        peft-graft evaluate out/graft --text labelled.jsonl --metric exact,rouge
        peft-graft evaluate out/classifier --text labelled.csv --columns message,label
    """
    names = None if metric is None else [name.strip() for name in metric.split(",")]
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
