"""Commands that get their options when they are called: making those of all takes longer than a help page may."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from peft_graft.cli.help import EXIT_CODES, Verb

_FUNCTIONS: dict[str, Callable[..., None]] = {}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command by the function's name, without a last ``_``.

    The first line of its docstring stands on the help page of them all; what follows ``Example:`` is shown as it is.
    """
    _FUNCTIONS[function.__name__.rstrip("_")] = function
    return function


def with_options(name: str) -> Any:
    """A command with all its options, ready to be called."""
    from peft_graft.cli.options import briefs_of, options_from

    alone = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    function = options_from(_FUNCTIONS[name])
    alone.command(name, cls=Verb)(function)
    made = typer.main.get_command(alone)
    assert isinstance(made, Verb)
    made.entries = list(inspect.signature(function).parameters.values())
    made.briefs = briefs_of(_FUNCTIONS[name])
    return made


class CommandsOnCall(TyperGroup):
    """Every ``command`` by name and docstring; the one that is called is made whole."""

    def __init__(self, **settings: Any) -> None:
        named = {name: TyperCommand(name, help=_first_line(function)) for name, function in _FUNCTIONS.items()}
        super().__init__(**{**settings, "commands": named, "epilog": f"Exit codes: {EXIT_CODES}."})

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is called and its arguments."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and with_options(str(name)), rest


def _first_line(function: Callable[..., None]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]
