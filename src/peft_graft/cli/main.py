"""The command ``peft-graft``: a thin layer over the functions of the same names."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import peft_graft
from peft_graft.cli.display import escaped, show_alignment, show_graft, show_inspection
from peft_graft.errors import GraftError
from peft_graft.options import MAX_TOKENS, METHOD_SUMMARIES, POLISH, UNFINISHED, HeadChoice
from peft_graft.options import Progress as ProgressCall

if TYPE_CHECKING:
    from pydantic import BaseModel

app = typer.Typer(
    name="peft-graft",
    help="Move trained LoRA and adapter modules from one transformer to another.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_INTERRUPTED = 130
_METHOD_HELP = "; ".join(f"{name}: {summary}" for name, summary in METHOD_SUMMARIES.items())


Layers = Annotated[
    str,
    typer.Option(
        help="skip, avg, or one teacher layer for each student layer, such as 0,2,4; encoder=skip;decoder=0,2 by stack."
    ),
]
Columns = Annotated[
    str | None, typer.Option(help="Column of the text, or two columns of sentence pairs: premise,hypothesis.")
]
MaxTokens = Annotated[int, typer.Option(help="Paired tokens that the alignment sees at most.")]
Seed = Annotated[int, typer.Option(help="Of the order in which text is sampled.")]
Device = Annotated[
    str, typer.Option(help="Torch device of the forward passes; auto spreads models over what is there (accelerate).")
]
StudentDevice = Annotated[str | None, typer.Option(help="The student's, where it is another one.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16, of the forward passes.")]
Force = Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")]
Cache = Annotated[
    bool | None,
    typer.Option(
        "--cache/--no-cache",
        help="Keep alignments for later modules of the same models and text, and use kept ones, in ~/.cache/peft-graft "
        "or where PEFT_GRAFT_CACHE says; on by default where that is set.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command()
def inspect(
    module: Annotated[str, typer.Argument(help="Folder or hub id of a module.")],
    student: Annotated[str | None, typer.Option(help="Plan a transfer to this model, without its weights.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The module's base, when its configuration is wrong.")] = None,
    layers: Layers = "skip",
    as_json: Json = False,
) -> None:
    """Say what a module is, where it attaches, and what would become of it on a student."""
    found = peft_graft.inspect(module, student=student, teacher=teacher, layers=layers)
    if as_json:
        _print_json(found)
    else:
        show_inspection(found)
    if found.student and found.student.problem:
        raise typer.Exit(1)


@app.command()
def transfer(
    module: Annotated[str, typer.Argument(help="Folder or hub id of a module, PEFT or AdapterHub.")],
    student: Annotated[str, typer.Option(help="Folder or hub id of the model that receives it.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    teacher: Annotated[str | None, typer.Option(help="The module's base; its configuration names it.")] = None,
    layers: Layers = "skip",
    method: Annotated[
        str | None, typer.Option(help=f"{_METHOD_HELP}. Whichever agrees best with the teacher when not given.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Unlabelled text to align, fit, polish and judge on: a file or hub data set.")
    ] = None,
    columns: Columns = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    alignment: Annotated[Path | None, typer.Option(help="A folder made by `peft-graft align`.")] = None,
    head: Annotated[
        HeadChoice,
        typer.Option(
            help="The saved classification head: carry it through the maps, fit it to the teacher's predictions on the "
            "text, drop it, or auto: carry or fit, whichever agrees better with the teacher."
        ),
    ] = "auto",
    polish: Annotated[
        int | None,
        typer.Option(
            help=f"Steps of label-free training on the teacher's predictions; {POLISH} when neither this nor --method "
            "is given and there is text, else 0. An interrupted polish goes on when the same command is run again."
        ),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            help="Modules to move, by role (attn.value,ffn.*), layer (0/*) or head (attn.value@0+3); all by default."
        ),
    ] = None,
    library: Annotated[
        str | None, typer.Option(help="Write a LoRA for peft or for adapters; for the module's own when not given.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    student_device: StudentDevice = None,
    dtype: Dtype = "float32",
    cache: Cache = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Move a trained module to another model and write an ordinary checkpoint for it."""
    with _progress() as progress, _say_how_to_go_on(out):
        graft = peft_graft.transfer(
            module,
            student=student,
            out=out,
            teacher=teacher,
            layers=layers,
            method=method,
            text=text,
            columns=_split(columns),
            max_tokens=max_tokens,
            alignment=alignment,
            head=head,
            polish=polish,
            sites=_split(sites),
            library=library,
            seed=seed,
            device=device,
            student_device=student_device,
            dtype=dtype,
            cache=cache,
            force=force,
            progress=progress,
        )
    if as_json:
        _print_json(graft.report)
    else:
        show_graft(graft.report, out)


@app.command()
def align(
    teacher: Annotated[str, typer.Argument(help="Folder or hub id.")],
    student: Annotated[str, typer.Argument(help="Folder or hub id.")],
    text: Annotated[str, typer.Option(help="Text file or hub data set to align the models on.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    columns: Columns = None,
    layers: Layers = "skip",
    method: Annotated[str, typer.Option(help="The method whose maps to find.")] = "prune-align",
    sites: Annotated[
        str | None, typer.Option(help="Roles to cover, such as attn.query,attn.value or adapter; all by default.")
    ] = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    seed: Seed = 0,
    device: Device = "cpu",
    student_device: StudentDevice = None,
    dtype: Dtype = "float32",
    ray: Annotated[str | None, typer.Option(help="Run on Ray: local for this machine, or a cluster's address.")] = None,
    shards: Annotated[int | None, typer.Option(help="Parts of the text on Ray; one for each CPU by default.")] = None,
    cache: Cache = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Align two models once; every module of the pair can then move with `transfer --alignment`.

    Started by torchrun or accelerate, every process runs its share of the text.
    """
    with _progress() as progress, _say_how_to_go_on(out):
        found = peft_graft.align(
            teacher, student, text=text, out=out, columns=_split(columns), layers=layers, method=method,
            sites=_split(sites), max_tokens=max_tokens, seed=seed, device=device, student_device=student_device,
            dtype=dtype, ray=ray, shards=shards, cache=cache, force=force, progress=progress,
        )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":  # torchrun's other processes have the same to say
        show_alignment(found, out, as_json=as_json)


@app.command()
def study(
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
    ray: Annotated[str | None, typer.Option(help="Run on Ray: local for this machine, or a cluster's address.")] = None,
    cpus: Annotated[float, typer.Option(help="CPUs that one cell takes on Ray.")] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs that one cell takes on Ray.")] = 0,
    only: Annotated[
        str | None, typer.Option(help="Only cells whose id matches this pattern, and what they need.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells, what is done, and an estimate.")] = False,
) -> None:
    """Train teachers, move their modules, and compare: many models, tasks and languages, declared in one file."""
    from peft_graft.study import command

    with _progress() as progress:
        failed = command.study(
            file, paper=paper, out=out, changes=changes or [], ray=ray, cpus=cpus, gpus=gpus, only=only,
            dry_run=dry_run, progress=progress, console=Console(),
        )  # fmt: skip
    if failed:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models, modules and results.")] = Path("out/demo"),
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a module on a real teacher, move it, and compare: a few minutes on two CPU cores."""
    from peft_graft.study.demo import run_demo, show_demo

    with _progress() as progress:
        result = run_demo(out, seed=seed, force=force, progress=progress)
    if as_json:
        _print_json(result)
    else:
        show_demo(result, Console())


def main() -> None:
    """Entry point: one clear line for every error of ours, no half-written result after an interruption."""
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # typer turns the signal into its exit code
            raise KeyboardInterrupt
    except GraftError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escaped(str(error))}", soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        Console(stderr=True).print("interrupted; nothing was written")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's usage errors
            error.show()
            sys.exit(error.exit_code)
        raise
    sys.exit(code or 0)


def _split(names: str | None) -> list[str] | None:
    return [name.strip() for name in names.split(",")] if names else None


def _print_json(value: BaseModel) -> None:
    sys.stdout.write(json.dumps(value.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")


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


@contextmanager
def _progress() -> Iterator[ProgressCall | None]:
    """A progress display on standard error, none where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as display:
        tasks: dict[str, int] = {}

        def call(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                for finished in tasks.values():
                    display.update(finished, visible=False)  # type: ignore[arg-type]
                tasks[stage] = display.add_task(stage, total=total)
            display.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield call
