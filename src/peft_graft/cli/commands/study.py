"""The command ``study``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from peft_graft.cli.interrupts import continued
from peft_graft.cli.late import command
from peft_graft.cli.progress import watching

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
        Path | None, typer.Option(help="Folder for results; by default out/ and the study's name. May be shared.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change the study: KEY=VALUE, as models.E5=~/models/e5.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells, what is done, and an estimate.")] = False,
) -> None:
    """Train teachers, move their modules, and compare: many models, tasks and languages, declared in one file."""
    from peft_graft.study import command as studies

    with continued("finished cells are kept"), watching() as callbacks:
        failed = studies.study(
            file,
            paper=paper,
            out=out,
            changes=changes or [],
            config=config,
            dry_run=dry_run,
            callbacks=callbacks,
            console=Console(),
        )
    if failed:
        raise typer.Exit(1)
