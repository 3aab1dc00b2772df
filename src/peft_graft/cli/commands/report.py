"""The command ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_graft.cli.late import command


@command
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a graft.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write instead of report.html in the folder; it must not exist.")
    ] = None,
) -> None:
    """Make the page of a graft again, from its graft.json alone."""
    from rich.console import Console

    from peft_graft.cli.display import escaped
    from peft_graft.outputs import check_output_file
    from peft_graft.page.graft import PAGE, write_page
    from peft_graft.report import read_report

    if out is not None:
        check_output_file(out, force=False)
    write_page(read_report(folder, str(folder)), folder.absolute().name, out or folder / PAGE)
    Console(emoji=False).print(f"[bold green]written[/] {escaped(str(out or folder / PAGE))}", soft_wrap=True)
