"""The folder of a study: records of finished and failed cells, what cells leave for others, and locks.

    OUT/study.json        the study as it was last run, and the ids of its cells
    OUT/cells/ID.json     the record of a finished cell
    OUT/failures/ID.json  why a cell failed; the next run tries it again
    OUT/artifacts/ID/     what a cell leaves for others: a checkpoint, an alignment
    OUT/work/ID/          what an interrupted cell can go on from
    OUT/locks/ID          held by the process that works on the cell; the file stays

OUT may be on storage that several machines share, if its files can be locked (``filelock``).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peft_graft.errors import StudyError
from peft_graft.files import json_text, read_json
from peft_graft.outputs import umask, writing

_PARTS = ("cells", "failures", "artifacts", "work", "locks")


@dataclass(frozen=True)
class StudyFolder:
    """The files of a study, by the ids of its cells."""

    path: Path

    def prepare(self, study: Mapping[str, Any]) -> None:
        """Make the folder and note the study in it.

        Raises:
            StudyError: it cannot be written.
        """
        try:
            for name in _PARTS:
                (self.path / name).mkdir(parents=True, exist_ok=True)
            _write(self.path / "study.json", study)
        except OSError as error:
            raise StudyError(
                f"cannot be written ({error.strerror})", where=str(self.path), fix="choose another --out"
            ) from error

    def artifact(self, cell: str) -> Path:
        """Where a cell leaves what others need."""
        return self.path / "artifacts" / cell

    def work(self, cell: str) -> Path:
        """Where an unfinished cell keeps what it can go on from."""
        return self.path / "work" / cell

    def is_done(self, cell: str) -> bool:
        """Whether a cell has finished."""
        return self._record(cell).exists()

    def record(self, cell: str) -> dict[str, Any]:
        """The record of a finished cell."""
        return read_json(self._record(cell))

    @property
    def name(self) -> str:
        """What the study is called."""
        return str(read_json(self.path / "study.json").get("name", self.path.name))

    @property
    def finished(self) -> list[str]:
        """The cells that have finished of the study that was last run."""
        return self._of_study("cells")

    @property
    def failed(self) -> list[str]:
        """The cells of that study that have failed and not been done since."""
        return self._of_study("failures")

    def _of_study(self, part: str) -> list[str]:
        """Those that have a file, but for cells of other studies, and of the same with other options; all, in a folder
        in which the study's own are not noted."""
        own = read_json(self.path / "study.json").get("cells")
        found = {path.stem for path in (self.path / part).glob("*.json")}
        return sorted(found if own is None else found.intersection(own))

    def records(self, cells: Iterable[str]) -> list[dict[str, Any]]:
        """The records of those of the cells that have finished."""
        return [self.record(cell) for cell in cells if self.is_done(cell)]

    def result(self, cell: str) -> dict[str, Any]:
        """What a finished cell found."""
        return dict(self.record(cell)["result"])

    def error(self, cell: str) -> str:
        """Why a cell failed."""
        return str(read_json(self._failure(cell))["error"])

    def keep(self, record: Mapping[str, Any]) -> None:
        """Write the record of a finished cell.

        Raises:
            OutputError: it cannot be written.
        """
        with writing(self._record(record["id"])):
            _write(self._record(record["id"]), record)
            self._failure(record["id"]).unlink(missing_ok=True)

    def keep_failure(self, record: Mapping[str, Any]) -> None:
        """Write the record of a cell that failed.

        Raises:
            OutputError: it cannot be written.
        """
        with writing(self._failure(record["id"])):
            _write(self._failure(record["id"]), record)

    @contextmanager
    def claimed(self, cell: str) -> Iterator[bool]:
        """Hold the lock of a cell; False when another process has it. The system frees the lock of one that died.

        Its file is never removed: who had opened it would hold it beside the holder of a new one.
        """
        lock = FileLock(self.path / "locks" / cell)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _record(self, cell: str) -> Path:
        return self.path / "cells" / f"{cell}.json"

    def _failure(self, cell: str) -> Path:
        return self.path / "failures" / f"{cell}.json"


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON aside and rename it into place, so that a file that exists is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json_text(value, str(path), indent=2, sort_keys=True, default=list))
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~umask())  # others read studies on shared storage
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
