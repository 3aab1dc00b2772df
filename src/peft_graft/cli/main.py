"""The command ``peft-graft``: its verbs, and how it ends."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

import peft_graft
import peft_graft.cli.commands
from peft_graft.cli.interrupts import INTERRUPTED, exit_code, heed_sigterm, heeding_who_reads
from peft_graft.cli.late import CommandsOnCall
from peft_graft.cli.output import say_error, say_error_as_json
from peft_graft.errors import GraftError, lacks_memory, reason

app = typer.Typer(
    name="peft-graft",
    cls=CommandsOnCall,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


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


@heeding_who_reads()
def main() -> None:
    """Entry point: one clear line for every error of ours, no half-written result after an interruption."""
    heed_sigterm()
    try:
        code = app(standalone_mode=False, prog_name="peft-graft")
        if code == INTERRUPTED:  # typer turns the signal into its exit code
            raise KeyboardInterrupt
    except GraftError as error:
        say_error(error)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        Console(stderr=True).print("interrupted; nothing was written")
        say_error_as_json("Interrupted", "interrupted; nothing was written")
        sys.exit(exit_code())
    except BrokenPipeError:
        raise
    except OSError as error:  # the files that a command is for say more; this is for all others
        if error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        say_error(error, kind="OSError", message=f"{place}cannot be read or written ({error.strerror})")
        sys.exit(1)
    except BaseException as error:  # what libraries in Rust raise is no Exception
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's usage errors
            error.show()
            say_error_as_json("UsageError", getattr(error, "format_message", error.__str__)(), where=_option_of(error))
            sys.exit(error.exit_code)
        if not lacks_memory(error):
            raise
        message = (
            f"there is not enough memory, or no more threads ({reason(error)}). Fix: allow the process more "
            "(ulimit -v, ulimit -u, the container's limits), or set OMP_NUM_THREADS and RAYON_NUM_THREADS to 1; "
            "nothing was written"
        )
        say_error(error, kind="MemoryError", message=message)
        sys.exit(1)
    sys.exit(code or 0)


def _option_of(error: BaseException) -> str | None:
    """The option that a usage error is about, if it is about one."""
    parameter = getattr(error, "param", None)
    return getattr(error, "option_name", None) or (max(parameter.opts, key=len) if parameter else None)
