"""The command ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_graft.cli.late import command


@command
def report(
    place: Annotated[
        Path, typer.Argument(help="Folder of a graft, a shelf or a study, or a study's exported results.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write instead of report.html in the folder; it must not exist.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Of a study: show the page on this machine while it runs; Ctrl-C ends it.")
    ] = False,
    port: Annotated[int, typer.Option(help="With --serve: the port; 0 takes one that is free.")] = 0,
) -> None:
    """Make the page of a graft again, from its graft.json alone, that of a shelf, or that of a study so far.

    Example:
        peft-graft report out/graft
    """
    from peft_graft.cli.output import console_for_results, escaped, give
    from peft_graft.cli.results import PageResult
    from peft_graft.errors import StudyError
    from peft_graft.outputs import check_output_file, write_aside
    from peft_graft.page.graft import PAGE, graft_page
    from peft_graft.page.shelf import shelf_page
    from peft_graft.report import read_report
    from peft_graft.shelf import SHELF, read_shelf

    of_study = place.suffix == ".jsonl" or (place / "study.json").is_file()
    if serve and not of_study:
        raise StudyError("only a study's page is served", where=str(place), fix="leave --serve out")
    console = console_for_results()
    if serve:
        from peft_graft.study.serve import serving

        with serving(place, port) as server:
            console.print(f"http://127.0.0.1:{server.server_address[1]}/ shows {escaped(str(place))}; Ctrl-C ends it")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return
    file = out or (place.with_suffix(".html") if place.is_file() else place / PAGE)
    if out is not None:
        check_output_file(out, force=False)
    if of_study:
        from peft_graft.study.report import StudyResults, study_page

        page = study_page(StudyResults.read(place))
    elif (place / SHELF).is_file():
        page = shelf_page(read_shelf(place), place.absolute().name)
    else:
        page = graft_page(read_report(place, str(place)), place.absolute().name)
    write_aside(file, page, force=True)
    give(
        PageResult(out=str(file)), lambda: console.print(f"[bold green]written[/] {escaped(str(file))}", soft_wrap=True)
    )
