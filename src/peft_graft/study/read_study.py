"""Reading a study file: its text, what ``--set`` changes in it, and the places that it names."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peft_graft.config.base import nearest
from peft_graft.errors import StudyError, reason
from peft_graft.record import Record
from peft_graft.study.plugins import load_plugin
from peft_graft.study.spec import GenerationSpec, Grid, ModuleSpec, Study, TaskSpec, Training
from peft_graft.study.tasks import METRICS
from peft_graft.study.training import TrainingSettings


def read_study(path: Path, changes: Sequence[str] = ()) -> Study:
    """A study file, its local paths made absolute.

    Args:
        changes: ``key=value`` with a dotted key, such as ``models.E5=~/models/e5`` or ``training.student.epochs=3``;
            the value as TOML, or a plain string. So a study of hub models runs where there are only local copies.

    Raises:
        StudyError: the file cannot be read, or says something that a study cannot.
    """
    try:
        if path.is_char_device():  # which has no end
            raise ValueError("it is no file")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StudyError(f"the study file cannot be read ({reason(error)})", where=str(path)) from error
    known = {name: set(table) for name, table in content.items() if isinstance(table, dict)}
    for change in changes:
        _change(content, change)
    folder = path.resolve().parent
    if isinstance(content.get("plugins"), list):  # first, so that grids can name the methods that they register
        content["plugins"] = [load_plugin(_absolute(str(file), folder)) for file in content["plugins"]]
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise _refused(error, path) from error
    for change in changes:
        _check_named(study, change, known)
    tasks = {
        name: task.model_copy(
            update={
                key: _located(value, folder) for key in ("train", "validation", "test") if (value := getattr(task, key))
            }
        )
        for name, task in study.tasks.items()
    }
    models = {name: _located(value, folder) for name, value in study.models.items()}
    return study.model_copy(update={"models": models, "tasks": tasks})


def _refused(error: ValidationError, path: Path) -> StudyError:
    """What is wrong with a study file first, at its place in it."""
    first = error.errors(include_url=False)[0]
    loc = first["loc"]
    # A task's kind stands after its name.
    parts = [str(part) for index, part in enumerate(loc) if (loc[0], index) != ("tasks", 2)]
    place, fix = ".".join(parts) or "the file", "see docs/studies.md"
    if first["type"] == "extra_forbidden":
        known = [*_table_of(loc).model_fields]
        return StudyError(
            f"{place}: unknown key",
            where=str(path),
            expected=", ".join(known),
            found=parts[-1],
            fix=nearest(parts[-1], known) or fix,
        )
    if first["type"] == "union_tag_invalid":
        kinds = ", ".join([*METRICS, "generation"])
        found = first["ctx"]["tag"]
        return StudyError(f"{place}: no such kind of task", where=str(path), expected=kinds, found=found, fix=fix)
    message = "expected a list" if first["type"] == "tuple_type" else first["msg"].removeprefix("Value error, ")
    return StudyError(f"{place}: {message}", where=str(path), fix=fix)


def _table_of(loc: Sequence[int | str]) -> type[Record]:
    """What a table of a study file says, by the place of one of its keys."""
    tables: dict[str, type[Record]] = {"grid": Grid, "modules": ModuleSpec, "training": Training}
    if loc[0] == "training" and len(loc) > 2:
        return TrainingSettings
    if loc[0] == "tasks":
        return GenerationSpec if loc[2] == "generation" else TaskSpec
    return tables.get(str(loc[0]), Study) if len(loc) > 1 else Study


def _change(content: dict[str, Any], change: str) -> None:
    _, equals, text = change.partition("=")
    *tables, last = _parts(change)
    if not equals or not last:
        raise StudyError("cannot be understood", where=f"--set {change}", expected="KEY=VALUE")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table: Any = content
    for name in tables:
        if isinstance(table, list):
            index = _number(name, table)
            table = None if index is None else table[index]
        else:
            table = table.setdefault(name, {})
        if not isinstance(table, dict | list):
            raise StudyError("names no table of the study", where=f"--set {change}", found=name)
    place = _number(last, table) if isinstance(table, list) else last
    if place is None:
        raise StudyError("names nothing in this list of the study", where=f"--set {change}", found=last)
    table[place] = value


def _parts(change: str) -> list[str]:
    """The names of a key, one of which is in quotes where it has a dot in it, as TOML has it."""
    key = change.partition("=")[0].strip()
    try:
        found: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return key.split(".")
    parts = []
    while isinstance(found, dict):
        ((name, found),) = found.items()
        parts.append(name)
    return parts


def _check_named(study: Study, change: str, known: Mapping[str, set[str]]) -> None:
    """Refuse a new model, module or task that no grid names: one that is misspelt would change nothing.

    Args:
        known: the names in the file's tables.
    """
    table, name = [*_parts(change), ""][:2]
    used = {
        "models": {model for grid in study.grid for model in (grid.teacher, grid.student)},
        "modules": {module for grid in study.grid for module in grid.modules},
        "tasks": {task for grid in study.grid for task in grid.tasks},
    }.get(table)
    if used is None or name in used | known.get(table, set()):
        return
    near = get_close_matches(name.lower(), {one.lower(): one for one in used}, n=1)
    likely = next((one for one in used if near and one.lower() == near[0]), None)
    raise StudyError(
        f"no grid of the study names such a {table.removesuffix('s')}",
        where=f"--set {change}",
        expected=", ".join(sorted(used)),
        found=name,
        fix=f"did you mean {table}.{likely}?" if likely else None,
    )


def _number(name: str, of: list[Any]) -> int | None:
    """A place in a list, None where it has none of this number."""
    number = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else len(of)
    return number if number < len(of) else None


def paper_study(name: str) -> Path:
    """The file of one of the paper's two grids, ``matching`` or ``incompatible``."""
    return Path(str(files("peft_graft.study") / "paper" / f"{name}.toml"))


def _located(value: str, folder: Path) -> str:
    """A local path made absolute; the name of a model or data set of the hub stays."""
    if value.startswith((".", "/", "~")):
        return _absolute(value, folder)
    return value


def _absolute(path: str, folder: Path) -> str:
    try:
        return str((folder / Path(path).expanduser()).resolve())
    except RuntimeError as error:
        raise StudyError(
            f"there is no such place ({reason(error)})", where=path, fix="write the path in full"
        ) from error
