"""The command ``study``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_graft.cli.interrupts import continued
from peft_graft.cli.late import command
from peft_graft.cli.output import give, say_if_quiet
from peft_graft.cli.progress import watching
from peft_graft.cli.study_view import counted, show_plan, show_run

if TYPE_CHECKING:
    from peft_graft.config import StudyConfig


@command
def study(
    config: StudyConfig,
    file: Annotated[Path | None, typer.Argument(help="The study, a TOML file (docs/studies.md).")] = None,
    paper: Annotated[
        str | None, typer.Option(help="One of the paper's grids instead of a file: matching or incompatible.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for results; by default out/ and the study's name. May be shared.",
            rich_help_panel="Output",
        ),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change the study: KEY=VALUE, as models.E5=~/models/e5.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what there is to do, and about how long.")] = False,
    ids: Annotated[bool, typer.Option("--list", help="As --dry-run, and every cell by its id.")] = False,
) -> None:
    """Train teachers, move their modules, and compare: many models, tasks and languages, declared in one file.

    Example:
        peft-graft study my-study.toml --dry-run
    """
    from peft_graft.study.command import plan_study
    from peft_graft.study.command import study as run

    if dry_run or ids:
        plan = plan_study(file, paper=paper, out=out, changes=changes or [], config=config)
        give(plan, lambda: show_plan(plan, ids=ids))
        return
    with continued("finished cells are kept"), watching() as callbacks:
        found, tables = run(file, paper=paper, out=out, changes=changes or [], config=config, callbacks=callbacks)
    give(found, lambda: show_run(found, tables, config.export))
    for name, error in found.failed.items():
        say_if_quiet(f"{name}: {error}")
    if found.failed or found.blocked:
        say_if_quiet(f"{counted(found)}; {Path(found.out) / 'failures'} says of each that failed how it came to that")
        raise typer.Exit(1)
