"""Commands that get their options when they are called: making those of all takes longer than a help page may."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_FUNCTIONS: dict[str, Callable[..., None]] = {}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command by the function's name; the first line of its docstring stands on the help page of them all."""
    _FUNCTIONS[function.__name__] = function
    return function


def with_options(name: str) -> Any:
    """A command with all its options, ready to be called."""
    from peft_graft.cli.options import options_from

    alone = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    alone.command(name)(options_from(_FUNCTIONS[name]))
    return typer.main.get_command(alone)


class CommandsOnCall(TyperGroup):
    """Every ``command`` by name and docstring; the one that is called is made whole."""

    def __init__(self, **settings: Any) -> None:
        named = {name: TyperCommand(name, help=inspect.getdoc(function)) for name, function in _FUNCTIONS.items()}
        super().__init__(**{**settings, "commands": named})

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is called and its arguments."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and with_options(str(name)), rest
