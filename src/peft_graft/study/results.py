"""Published results: one line of JSON for every cell whose figures a page shows, in a file that grows by runs.

A line is the record of a finished cell: ``id``, ``kind``, ``names``, ``needs``, ``result``, options, software, machine
and time. Records of several studies can stand in one file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_graft.errors import StudyError
from peft_graft.files import json_text
from peft_graft.outputs import reserved, write_aside

Record = Mapping[str, Any]
#: An alignment has no figures.
_KINDS = ("teacher", "bare-teacher", "graft", "polish", "control", "rate", "student")

#: What is published of a configuration.
_CONFIG = ("module", "training", "transfer", "budget", "share", "rates", "keep_best", "control")

#: Sentences for a user.
_WORDS = frozenset({"method_reason", "notes", "text"})
#: Parts of a verdict that most have not.
_OPTIONAL = frozenset(
    {"agreement_interval", "carried", "constant", "divergence_interval", "generated", "moved", "undefined"}
)


def about(record: Record, model: str) -> tuple[str, ...]:
    """What a record is about: its ``teacher`` or ``student``, module, task and language."""
    return tuple(record["names"][name] for name in (model, "module", "task", "language"))


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a file, in its order.

    Raises:
        StudyError: the file cannot be read, or a line is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"the results cannot be read ({error})", where=str(path)) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise StudyError(f"not JSON ({error})", where=f"{path}, line {number}") from error
        missing = {"id", "kind", "names", "result"} - set(record if isinstance(record, dict) else ())
        if missing:
            raise StudyError(
                "not the record of a cell", where=f"{path}, line {number}", expected=", ".join(sorted(missing))
            )
        records.append(record)
    return records


def write_results(records: Sequence[Record], path: Path) -> None:
    """Write records, a line each.

    Raises:
        OutputError: they cannot be written, or a number in them is not finite.
    """
    lines = [json_text(record, str(path), separators=(",", ":")) for record in records]
    write_aside(path, "".join(f"{line}\n" for line in lines), force=True)


def export(records: Sequence[Record], path: Path, *, study: str) -> int:
    """Add the records of a study's finished cells to a file, those that it has left alone.

    Returns:
        How many were added.

    Raises:
        OutputError: it cannot be written, or another process is writing there.
    """
    with reserved(path):
        there = read_results(path) if path.exists() else []
        known = {record["id"] for record in there}
        new = [_published(one, study) for one in records if one["kind"] in _KINDS and one["id"] not in known]
        write_results([*there, *new], path)
    return len(new)


def _published(record: Record, study: str) -> dict[str, Any]:
    """A record without the places of models and examples, which mean nothing elsewhere; its figures rounded."""
    config = {key: value for key, value in record["config"].items() if key in _CONFIG}
    if "transfer" in config:
        config["transfer"] = {key: value for key, value in config["transfer"].items() if value is not None}
    return {"study": study, **record, "config": config, "result": _rounded(record["result"])}


def _rounded(value: Any) -> Any:
    """The same with six digits of each fraction, more than any figure is made of, and without what was not measured, or
    is said in words."""
    if isinstance(value, dict):
        kept = {
            key: one for key, one in value.items() if key not in _WORDS and (one is not None or key not in _OPTIONAL)
        }
        return {key: _rounded(one) for key, one in kept.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
