"""Help pages of the verbs: what matters on a screen of 80 columns, the rest by name, and whole with ``--help-all``."""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand
from typer.models import ArgumentInfo

#: Width of the column of names; what is longer has its explanation below it. And of a page at most.
_NAMES, _WIDEST = 24, 100
#: Panel of what has no other, and those at the end.
_FIRST, _LAST = "What", ("Loading", "Output")
#: How a command ends; ``cli.main`` gives these codes.
EXIT_CODES = (
    "0 done, 1 refused or failed, 2 wrong usage, 130 interrupted (Ctrl-C), 141 output not read to its end, 143 ended "
    "by SIGTERM"
)


class Verb(TyperCommand):
    """A command whose help page has panels.

    Attributes:
        entries: its parameters, by their signature. briefs: those that matter most, with a line for the short page, an
            empty one where the help is short; the others are only named there.
    """

    entries: Sequence[inspect.Parameter] = ()
    briefs: dict[str, str] = {}

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page."""
        del formatter
        whole = bool(ctx.meta.get("help_all"))
        console = Console(highlight=False, emoji=False)
        console.width = min(console.width, _WIDEST)
        about, _, example = inspect.cleandoc(self.help or "").partition("Example:")
        needed = [each for each in self.entries if _is_argument(each) or each.default is inspect.Parameter.empty]
        given = " ".join(_usage(each) for each in sorted(needed, key=lambda each: not _is_argument(each)))
        console.print(Text(" ".join(f"Usage: {ctx.command_path} {given} [options]".split()) + "\n", style="bold"))
        for paragraph in about.strip().split("\n\n"):
            console.print(Text(" ".join(paragraph.split()) + "\n"))
        self._panels(console, whole=whole)
        if example:
            console.print(Text("Example", style="bold"))
            for line in inspect.cleandoc(example).splitlines():
                console.print(Text(f"  {line}"), soft_wrap=True)
            console.print()
        console.print(Text(f"Exit codes: {EXIT_CODES}", style="dim"))

    def _panels(self, console: Console, *, whole: bool) -> None:
        panels: dict[str, list[inspect.Parameter]] = {}
        for each in sorted(self.entries, key=lambda entry: not _is_argument(entry)):
            if not _info(each).hidden:
                panels.setdefault(_info(each).rich_help_panel or _FIRST, []).append(each)
        others: list[str] = []
        for title, parameters in sorted(
            panels.items(), key=lambda panel: _LAST.index(panel[0]) if panel[0] in _LAST else -1
        ):
            shown = [each for each in parameters if whole or each.name in self.briefs]
            others += [_names(each)[-1] for each in parameters if each not in shown]
            if shown:
                console.print(Text(title, style="bold"))
                for each in shown:
                    _show(console, each, None if whole else self.briefs[each.name])
                console.print()
        if others:
            console.print(Text("More, explained by --help-all", style="bold"))
            console.print(Padding(Text(" ".join(others)), (0, 0, 1, 2), expand=False))


def _show(console: Console, parameter: inspect.Parameter, brief: str | None) -> None:
    """A parameter's names, what it takes and what it is for."""
    value, text = _value(parameter), brief or str(_info(parameter).help or "")
    default = parameter.default
    if brief is None and not isinstance(default, bool) and default not in (None, inspect.Parameter.empty, ""):
        text += f" [{default}]"
    if "|" in value:
        text, value = f"{value.replace('|', ', ')}: {text}", ""
    label = " ".join(part for part in (", ".join(_names(parameter)), value) if part)
    if len(label) > _NAMES:
        console.print(Text(f"  {label}", style="cyan"))
        label = ""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=_NAMES, no_wrap=True)
    grid.add_column()
    grid.add_row(Text(label, style="cyan"), Text(text))
    console.print(Padding(grid, (0, 0, 0, 2), expand=False))


def _usage(parameter: inspect.Parameter) -> str:
    return " ".join([*_names(parameter)[-1:], _value(parameter)])


def _info(parameter: inspect.Parameter) -> Any:
    """What typer is told of a parameter."""
    return parameter.annotation.__metadata__[0]


def _is_argument(parameter: inspect.Parameter) -> bool:
    return isinstance(_info(parameter), ArgumentInfo)


def _names(parameter: inspect.Parameter) -> list[str]:
    """The names of an option, its long one last; an argument has none, for its value says it all."""
    if _is_argument(parameter):
        return []
    info = _info(parameter)  # whose first word typer takes for a default where it stands in an annotation
    given = [name for name in (info.default, *(info.param_decls or ())) if str(name).startswith("-")]
    return sorted(given, key=len) or [f"--{parameter.name.replace('_', '-')}"]


def _value(parameter: inspect.Parameter) -> str:
    """What a parameter takes: a word in capitals, its choices, or nothing."""
    kind = parameter.annotation.__origin__
    members = [each for each in get_args(kind) if each is not type(None)]
    if get_origin(kind) in (Union, types.UnionType) and len(members) == 1:
        kind = members[0]
    if kind is bool:
        return ""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return "|".join(each.value for each in kind)
    if _info(parameter).metavar or _is_argument(parameter):
        more = "..." if _is_argument(parameter) and kind == list[str] else ""
        return str(_info(parameter).metavar or parameter.name.upper()) + more
    return {int: "N", float: "X", Path: "PATH", list[str]: "TEXT"}.get(kind, "TEXT")
