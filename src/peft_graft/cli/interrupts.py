"""What happens when a run is ended from outside: by Ctrl-C, or by SIGTERM as containers and schedulers send it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from peft_graft.cli.output import escaped, say_error_as_json
from peft_graft.run import UNFINISHED

INTERRUPTED = 128 + signal.SIGINT
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
