"""What a command prints: one look for all, asked for by the options that every command has."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from peft_graft.errors import GraftError, plain

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass
class Look:
    """How the command that runs shows itself.

    Attributes:
        as_json: the result as JSON is all that goes to standard output. quiet: nothing but errors is shown.
        verbose: also what is long: tables by site, every option of a plan.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False


#: That of this process, which runs one command.
look = Look()


def escaped(text: str, *, lines: bool = False) -> str:
    """Text as rich prints it unchanged, with the codes in it shown and not sent to the terminal.

    Args:
        lines: whether line ends are kept, as in answers; names and messages are shown on one line.
    """
    return escape("\n".join(map(plain, text.split("\n"))) if lines else plain(text))


def console_for_results() -> Console:
    """Standard output, as results are shown there: names in them are never read as emoji or coloured."""
    return Console(emoji=False, highlight=False)


def give(result: BaseModel, show: Callable[[], None]) -> None:
    """The result of a command, as it was asked for: as JSON, shown, or not at all."""
    if look.as_json:
        print_json(result.model_dump(mode="json"))
    elif not look.quiet:
        show()


def print_json(value: Any) -> None:
    """Print JSON, with the codes in it shown and not sent to the terminal."""
    from peft_graft.files import json_text

    text = json_text(value, "--json", indent=2)
    codes = {letter for letter in text if not letter.isprintable() and letter != "\n"}  # which a terminal would obey
    sys.stdout.write(text.translate({ord(letter): json.dumps(letter)[1:-1] for letter in codes}) + "\n")


def say(text: str) -> None:
    """A line on standard error beside the result, but for ``--quiet``."""
    if not look.quiet:
        Console(stderr=True, highlight=False, emoji=False).print(escaped(text), soft_wrap=True)


def say_if_quiet(problem: str) -> None:
    """A line on standard error about what failed, where ``--quiet`` keeps back the result that has it."""
    if look.quiet and not look.as_json:
        Console(stderr=True, highlight=False, emoji=False).print(
            f"[bold red]error:[/] {escaped(problem)}", soft_wrap=True
        )


def say_error(error: BaseException, *, kind: str | None = None, message: str | None = None) -> None:
    """One line on standard error; with ``--json`` the same on standard output, in parts.

    Args:
        kind, message: in place of the error's own.
    """
    text = plain(message or str(error))
    Console(stderr=True, highlight=False, emoji=False).print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
    parts = {name: getattr(error, name, None) for name in ("where", "expected", "found", "fix")}
    own = error.message if isinstance(error, GraftError) else text
    say_error_as_json(kind or type(error).__name__, own, **parts)


def say_error_as_json(kind: str, message: str, **parts: Any) -> None:
    """An error on standard output, where ``--json`` was asked for: on a command line that is wrong too."""
    if "--json" not in sys.argv[1:]:
        return
    found = {name: None if parts.get(name) is None else str(parts[name]) for name in _PARTS}
    text = json.dumps({"error": {"kind": kind, "message": message, **found}}, indent=2)
    sys.stdout.write(text + "\n")


_PARTS = ("where", "expected", "found", "fix")
