"""Command-line options made from the fields of a config."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import peft_graft.config as configs
from peft_graft.cli.output import look
from peft_graft.config import METHOD_SUMMARIES, method_help, option_name, option_of
from peft_graft.config.base import OUTPUT
from peft_graft.errors import PlanError


def options_from(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an option for every field of the config that it takes as ``config``, if it does."""
    hints = get_type_hints(command, localns=vars(configs), include_extras=True)
    config: type[BaseModel] | None = hints.pop("config", None)
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name in hints
    ]
    taken = {parameter.name for parameter in own}
    fields = {name: field for name, field in (config.model_fields if config else {}).items() if name not in taken}

    common = [each for each in _common() if each.name not in taken]

    def run(**values: Any) -> None:
        del values[_HELP_ALL.name]
        for each in common:
            setattr(look, each.name, values.pop(each.name))
        if config:
            chosen = {name: _value(field, values.pop(name)) for name, field in fields.items()}
            values["config"] = config(**{name: value for name, value in chosen.items() if value is not None})
        command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    made = [_parameter(config, name, field) for name, field in fields.items() if config]
    parameters = [*own, *made, *common, _HELP_ALL]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def words_of(config: BaseModel) -> list[str]:
    """What to type for a config: the options that are not at their defaults, without those that no record may show."""
    words: list[str] = []
    for name, field in type(config).model_fields.items():
        value, option = getattr(config, name), option_name(name)
        if value == field.default or field.exclude:  # a token is not for screens and logs
            continue
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [option, ",".join(map(str, value))]
        else:
            words += [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def briefs_of(command: Callable[..., None]) -> dict[str, str]:
    """The parameters that matter most, with a line for the help page; an empty one where their help is short."""
    hints = get_type_hints(command, localns=vars(configs), include_extras=True)
    config: type[BaseModel] | None = hints.pop("config", None)
    briefs = dict.fromkeys([*(name for name in hints if name != "return"), *(each.name for each in _common())], "")
    options = {name: option_of(config, name) for name in config.model_fields} if config else {}
    return briefs | {name: option.brief for name, option in options.items() if option.brief and name not in hints}


def _common() -> list[inspect.Parameter]:
    """Options that every command has: the fields of ``Look``."""
    named = {
        "as_json": ("--json", "The result as JSON on standard output (docs/cli.md)."),
        "quiet": ("--quiet", "-q", "Show nothing but errors."),
        "verbose": ("--verbose", "-v", "Show what is long too, such as tables by site."),
    }
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option(*names, help=text, rich_help_panel=OUTPUT)],
        )
        for name, (*names, text) in named.items()
    ]


def _show_all(ctx: typer.Context, *, asked: bool) -> None:
    if asked:
        ctx.meta["help_all"] = True
        ctx.get_help()
        raise typer.Exit


_HELP_ALL = inspect.Parameter(
    "help_all",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option("--help-all", callback=lambda ctx, value: _show_all(ctx, asked=value), is_eager=True, hidden=True),
    ],
)


def _parameter(config: type[BaseModel], name: str, field: FieldInfo) -> inspect.Parameter:
    option, default = option_of(config, name), field.default
    kind = _kind(field)
    # A switch that may be left open needs both of its names; others have the one that changes something.
    names = [option_name(name)] if (kind is bool and default is False) or name.endswith("_") else []
    help_text = field.description or ""
    if name == "method":
        help_text = f"{method_help(METHOD_SUMMARIES)}. {help_text}".strip()
    shown = typer.Option(*names, help=help_text, rich_help_panel=option.panel, show_default=default is not None)
    annotation: Any = Annotated[kind if default is not None else kind | None, shown]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind(field: FieldInfo) -> Any:
    """What a field is on the command line: a number, a switch, a choice, or text."""
    members = [member for member in get_args(field.annotation) or (field.annotation,) if member is not type(None)]
    if get_origin(field.annotation) is Literal:
        return field.annotation
    if len(members) == 1 and members[0] in (int, float, bool, str):
        return members[0]
    if len(members) == 1 and isinstance(members[0], type) and issubclass(members[0], StrEnum):
        return members[0]
    return str  # lists, JSON, and numbers that may also be a word


def _value(field: FieldInfo, given: Any) -> Any:
    """What was typed as the config takes it: lists with commas, JSON where there are braces."""
    if not isinstance(given, str):
        return given
    members = get_args(field.annotation) or (field.annotation,)
    if any(get_origin(member) is tuple for member in (*members, field.annotation)):
        return tuple(part.strip() for part in given.split(",")) if given else None
    if given.lstrip().startswith("{") and any(get_origin(member) is dict for member in members):
        try:
            return json.loads(given)
        except json.JSONDecodeError as error:
            raise PlanError("the value is not JSON", where=given, found=str(error)) from error
    return int(given) if int in members and given.lstrip("-").isdigit() else given
