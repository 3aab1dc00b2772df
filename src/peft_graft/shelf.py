"""A shelf of modules that move together: what is on it, and what became of each."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from peft_graft.distill.agreement import Verdict
from peft_graft.errors import CheckpointError, PlanError, reason
from peft_graft.files import read_json
from peft_graft.record import Record

#: The report of a shelf, in its folder.
SHELF = "shelf.json"
#: What no graft of it can be called: its report and the page of it.
_TAKEN = (SHELF, "report.html")
#: What a folder is named by itself.
_PLAIN = re.compile(r"[^\w.\-]+")


class ShelfModule(Record):
    """A module on a shelf.

    Attributes:
        adapter: folder or hub id. name: of its graft's folder; by default the last part of ``adapter``.
        teacher, text, seeds: of this module, where they are not those of all; as for ``transfer``.
    """

    adapter: str
    name: str | None = None
    teacher: str | None = None
    text: str | None = None
    seeds: str | None = None

    @property
    def folder(self) -> str:
        """The name of its graft's folder."""
        return self.name or _PLAIN.sub("_", Path(self.adapter).absolute().name).strip(".") or "module"


class ShelfEntry(Record):
    """What became of a module.

    Attributes:
        name: of its folder. module, teacher: as they were given; no teacher where the module could not be read.
        state: ``kept`` where a finished graft of the same work was there. error: why it failed.
        method, verdict: of its graft.
        first: whether models were loaded, and aligned, for it. seconds: that it took, with that.
    """

    name: str
    module: str
    teacher: str | None = None
    state: Literal["written", "kept", "failed"]
    error: str | None = None
    method: str | None = None
    verdict: Verdict | None = None
    first: bool = False
    seconds: float | None = None


class ShelfReport(Record):
    """All modules of a shelf, as ``shelf.json`` holds them."""

    format_version: int = 1
    student: str
    modules: list[ShelfEntry]
    first_seconds: float | None = None
    next_seconds: float | None = None

    @classmethod
    def of(cls, student: str, modules: Sequence[ShelfEntry]) -> ShelfReport:
        """The report, with what the first module of a teacher costs and what each after it: medians, in seconds."""
        first, after = (
            [one.seconds for one in modules if one.seconds is not None and one.error is None and one.first is which]
            for which in (True, False)
        )
        return cls(
            student=student,
            modules=list(modules),
            first_seconds=round(statistics.median(first), 1) if first else None,
            next_seconds=round(statistics.median(after), 1) if after else None,
        )

    @property
    def failed(self) -> list[ShelfEntry]:
        """Those that could not be moved."""
        return [module for module in self.modules if module.state == "failed"]


def read_shelf(folder: Path) -> ShelfReport:
    """The report in a shelf's folder.

    Raises:
        CheckpointError: there is none, or it is damaged or of another version.
    """
    place = folder / SHELF
    try:
        return ShelfReport.model_validate(read_json(place))
    except ValidationError as error:
        raise CheckpointError(
            f"the report was written by another version ({str(error).splitlines()[0]})",
            where=str(place),
            fix="transfer the modules again: what is there is kept",
        ) from error


def read_list(path: Path) -> list[ShelfModule]:
    """The modules of a list: a folder or hub id a line, or JSON with the names of ``ShelfModule``; # begins a remark.
    Or all of it is an array of JSON, of such strings and objects.

    Raises:
        PlanError: the file cannot be read, or a line is no module.
    """
    where = f"--list {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
        array = json.loads(text) if text.lstrip().startswith("[") else None
        odd = [one for one in array or () if not isinstance(one, str | dict)]
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"the list cannot be read ({reason(error)})", where=where) from error
    if odd:
        raise PlanError("not a module", where=where, expected="a folder, a hub id, or an object", found=odd[0])
    lines = text.splitlines() if array is None else [one if isinstance(one, str) else json.dumps(one) for one in array]
    found = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        try:
            found.append(ShelfModule(**json.loads(line)) if line.startswith("{") else ShelfModule(adapter=line))
        except (ValueError, RecursionError) as error:
            said = error.errors()[0] if isinstance(error, ValidationError) else None
            what = f"{'.'.join(map(str, said['loc']))}: {said['msg']}" if said else reason(error)
            raise PlanError(
                f"not a module ({what})",
                where=f"{where}, line {number}",
                expected=f"a folder, a hub id, or JSON with {', '.join(ShelfModule.model_fields)}",
                found=line,
            ) from error
    return found


def check_names(modules: Sequence[ShelfModule]) -> None:
    """Refuse modules whose grafts would be written to the same folder, or to none below the shelf.

    Raises:
        PlanError: there is no module, two have one name, or a name is none of a folder.
    """
    if not modules:
        raise PlanError("there is no module to move", fix="name some, or a --list of them")
    fix = 'name them in a list: {"adapter": "...", "name": "..."}'
    seen: dict[str, ShelfModule] = {}
    for module in modules:
        name = module.folder
        if name != Path(name).name or name.startswith(".") or name.casefold() in _TAKEN:
            raise PlanError("not the name of a folder", where=module.adapter, found=name, fix=fix)
        other = seen.setdefault(name.casefold(), module)  # some file systems know no case
        if other is not module:
            raise PlanError(
                "two modules would be written to the same folder",
                where=name,
                found=f"{other.adapter} and {module.adapter}",
                fix=fix,
            )
