"""The command ``peft-graft``: a thin layer over the functions of the same names."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

import peft_graft
from peft_graft.cli.display import escaped, show_alignment, show_evaluation, show_graft, show_inspection
from peft_graft.cli.late import CommandsOnCall, command
from peft_graft.cli.progress import watching
from peft_graft.errors import GraftError
from peft_graft.run import UNFINISHED

if TYPE_CHECKING:
    from pydantic import BaseModel

    from peft_graft.config import AlignConfig, EvaluateConfig, GraftConfig, StudyConfig

app = typer.Typer(
    name="peft-graft",
    cls=CommandsOnCall,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
_INTERRUPTED = 128 + signal.SIGINT
#: SIGTERM, once it has come.
_terminated: list[int] = []

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@command
def inspect(
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a module.")],
    config: GraftConfig,
    student: Annotated[str | None, typer.Option(help="Plan a transfer to this model, without its weights.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The module's base, if its configuration is wrong.")] = None,
    text: Annotated[str | None, typer.Option(help="The text that the transfer would be given.")] = None,
    seeds: Annotated[str | None, typer.Option(help="The examples that the transfer would make prompts from.")] = None,
    alignment: Annotated[str | None, typer.Option(help="The alignment that the transfer would be given.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a module is, where it attaches, and what would become of it on a student."""
    found = peft_graft.inspect(
        adapter, student, teacher=teacher, text=text, seeds=seeds, alignment=alignment, config=config
    )
    if as_json:
        _print_json(found)
    else:
        show_inspection(found)
    if found.teacher_problem or (found.student and found.student.problem):
        raise typer.Exit(1)


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
    with watching() as callbacks, _say_how_to_go_on(out):
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
        _print_json(graft.report)
    else:
        show_graft(graft.report, out)


@command
def align(
    teacher: Annotated[str, typer.Argument(help="Folder or hub id.")],
    student: Annotated[str, typer.Argument(help="Folder or hub id.")],
    config: AlignConfig,
    text: Annotated[str, typer.Option(help="Text file or hub data set to align the models on.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    as_json: Json = False,
) -> None:
    """Align two models once; every module of the pair can then move with `transfer --alignment`.

    Started by torchrun or accelerate, every process runs its share of the text.
    """
    with watching() as callbacks, _say_how_to_go_on(out):
        found = peft_graft.align(teacher, student, text=text, out=out, config=config, callbacks=callbacks)
    if os.environ.get("RANK", "0") == "0":  # torchrun's other processes have the same to say
        show_alignment(found, out, as_json=as_json)


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
    out: Annotated[Path | None, typer.Option(help="JSON file to write, with all answers; it must not exist.")] = None,
    as_json: Json = False,
) -> None:
    """Score what a graft answers, beside its student without it and the teacher, against answers that are known."""
    names = [name.strip() for name in metric.split(",")]
    with watching() as callbacks, _say_how_to_go_on(out) if out else nullcontext():
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
    if as_json:
        _print_json(found)
    else:
        show_evaluation(found, out)


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

    with _continued("finished cells are kept"), watching() as callbacks:
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


@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models, modules and results.")] = Path("out/demo"),
    llm: Annotated[
        bool, typer.Option("--llm", help="Move a LoRA between language models, SmolLM2 and Gemma-3 (extra demo-llm).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of what is trained first; the students after it have the next ones.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the results of an earlier run.")] = False,
    as_json: Json = False,
) -> None:
    """Move a real module between real models, and compare: some minutes on two CPU cores."""
    from peft_graft.study.demo import run_demo, show_demo
    from peft_graft.study.demo_llm import run_demo_llm

    with _continued(f"finished parts are in {out}"), watching(lines=True) as callbacks:
        run = run_demo_llm if llm else run_demo
        result = run(out, seed=seed, force=force, callbacks=callbacks)
    if as_json:
        _print_json(result)
    elif isinstance(result, peft_graft.Evaluation):
        show_evaluation(result, out / "run" / "scores.json")
    else:
        show_demo(result, Console())


def _say_version(*, asked: bool) -> None:
    if asked:
        sys.stdout.write(f"peft-graft {peft_graft.__version__}\n")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=lambda asked: _say_version(asked=asked),
            is_eager=True,
            help="Say which version this is.",
        ),
    ] = False,
) -> None:
    """Move trained LoRA and adapter modules from one transformer to another."""


def main() -> None:
    """Entry point: one clear line for every error of ours, no half-written result after an interruption."""
    _terminated.clear()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # typer turns the signal into its exit code
            raise KeyboardInterrupt
    except GraftError as error:
        console = Console(stderr=True, highlight=False, emoji=False)
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        Console(stderr=True).print("interrupted; nothing was written")
        sys.exit(_exit_code())
    except OSError as error:  # the files that a command is for say more; this is for all others
        if error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        Console(stderr=True, highlight=False).print(
            f"[bold red]error:[/] {escaped(f'{place}cannot be read or written ({error.strerror})')}", soft_wrap=True
        )
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's usage errors
            error.show()
            sys.exit(error.exit_code)
        raise
    sys.exit(code or 0)


def _terminate(number: int, _: object) -> None:
    """End the run as Ctrl-C does; once, so that nothing disturbs the cleaning."""
    if not _terminated:
        _terminated.append(number)
        raise KeyboardInterrupt


def _exit_code() -> int:
    """That of the signal which has ended the run."""
    return 128 + _terminated[0] if _terminated else _INTERRUPTED


@contextmanager
def _continued(message: str) -> Iterator[None]:
    """Say what an interruption leaves, and end there."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"interrupted; {escaped(message)}, and the same command continues there", soft_wrap=True
        )
        sys.exit(_exit_code())


def _print_json(value: BaseModel) -> None:
    import json

    from peft_graft.files import json_text

    text = json_text(value.model_dump(mode="json"), "--json", indent=2)
    codes = {letter for letter in text if not letter.isprintable() and letter != "\n"}  # which a terminal would obey
    sys.stdout.write(text.translate({ord(letter): json.dumps(letter)[1:-1] for letter in codes}) + "\n")


@contextmanager
def _say_how_to_go_on(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if Path(f"{out}{UNFINISHED}").exists():
            Console(stderr=True).print(
                f"the work so far is in {escaped(f'{out}{UNFINISHED}')}; the same command goes on from there",
                soft_wrap=True,
            )
        raise
