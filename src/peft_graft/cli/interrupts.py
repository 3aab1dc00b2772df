"""What happens when a run is ended from outside: by Ctrl-C, by SIGTERM as containers and schedulers send it, or because
nobody reads its output any more."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console

from peft_graft.cli.output import escaped, say_error_as_json
from peft_graft.run import UNFINISHED

INTERRUPTED = 128 + signal.SIGINT
#: The exit code of what ends by SIGPIPE, as tools do in front of ``head``.
UNREAD = 141
#: SIGTERM, once it has come.
_came: list[int] = []


def heed_sigterm() -> None:
    """End the run on SIGTERM as on Ctrl-C, unless the process has its own way."""
    _came.clear()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, _: object) -> None:
    """End the run as Ctrl-C does; once, so that nothing disturbs the cleaning."""
    if not _came:
        _came.append(number)
        raise KeyboardInterrupt


@contextmanager
def heeding_who_reads() -> Iterator[None]:
    """End without a word where the output goes to a pipe that nobody reads any more.

    Python turns the signal into an error, which rich and typer turn into an exit as of a failure.
    """
    try:
        yield
    except (BrokenPipeError, SystemExit) as error:
        is_read = not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError)
        flushed = [_flushed(stream) for stream in (sys.stdout, sys.stderr)]  # the second too, whatever the first
        if is_read and all(flushed):
            raise
        sys.exit(UNREAD)


def _flushed(stream: TextIO | None) -> bool:
    """Whether what was written to a stream can be read; what cannot be goes nowhere, or Python would speak of it."""
    if stream is None:  # it was closed before the process began
        return True
    try:
        stream.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # it has no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def exit_code() -> int:
    """That of the signal which has ended the run."""
    return 128 + _came[0] if _came else INTERRUPTED


@contextmanager
def continued(message: str) -> Iterator[None]:
    """Say what an interruption leaves, and end there."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"interrupted; {escaped(message)}, and the same command continues there", soft_wrap=True
        )
        say_error_as_json("Interrupted", f"interrupted; {message}, and the same command continues there")
        sys.exit(exit_code())


@contextmanager
def saying_how_to_go_on(out: Path) -> Iterator[None]:
    """Say where the work so far of an interrupted run is, if any is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if Path(f"{out}{UNFINISHED}").exists():
            Console(stderr=True).print(
                f"the work so far is in {escaped(f'{out}{UNFINISHED}')}; the same command goes on from there",
                soft_wrap=True,
            )
        raise
