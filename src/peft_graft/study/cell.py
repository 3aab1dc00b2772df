"""What all cells of a study are: data with a stable id, and what they share in doing their work."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from pydantic import SerializerFunctionWrapHandler, model_serializer

from peft_graft.record import Record
from peft_graft.run import Callback
from peft_graft.study.data import read_task, read_unlabelled, text_file
from peft_graft.study.folder import StudyFolder
from peft_graft.study.plugins import Plugin, load_plugin
from peft_graft.study.spec import Budget, SomeTask
from peft_graft.study.tasks import Example, StudyTask

#: Bytes of the names in an id: file systems take files' names of 255.
_LONGEST = 200


class Names(Record):
    """What a cell is called in tables; what it is not about is None."""

    teacher: str | None = None
    student: str | None = None
    module: str | None = None
    task: str | None = None
    language: str | None = None
    method: str | None = None
    layers: str | None = None
    roles: str | None = None
    start: str | None = None
    budget: Budget | None = None
    seed: int | None = None


class Examples(Record):
    """The labelled examples of a task in one language.

    ``plugins``: of the study where the task is scored by what one of them registers.
    """

    task: str
    language: str
    spec: SomeTask
    plugins: tuple[Plugin, ...] = ()

    @model_serializer(mode="wrap")
    def _with_content(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """With the content of plugins, wherever they are, and as it always was where there are none."""
        found = {key: value for key, value in plainly(self).items() if key != "plugins"}
        return {**found, "plugins": [plugin.sha256 for plugin in self.plugins]} if self.plugins else found

    def read(self) -> tuple[StudyTask, list[Example], list[Example], list[Example]]:
        """The task and its training, validation and test examples."""
        load_plugins(self.plugins)
        return read_task(self.task, self.spec, self.language)


class Needs(Record):
    """The ids of the cells that come before one, by what they are for it."""

    teacher: str | None = None
    alignment: str | None = None
    graft: str | None = None
    rate: str | None = None
    other: str | None = None


class Config(Record):
    """Everything that the result of a cell depends on, beside what it needs."""

    examples: Examples
    device: str = "cpu"

    def hashed(self) -> dict[str, Any]:
        """As it enters the id."""
        return self.model_dump(mode="json")


class Cell(Record, ABC):
    """One unit of work."""

    kind: ClassVar[str]
    #: Part of the id; raised when the same configuration comes to stand for other work.
    version: ClassVar[int] = 2
    names: Names
    config: Config
    needs: Needs = Needs()

    @property
    def id(self) -> str:
        """Stable: the same work has the same id in every study, other work another."""
        content = [self.version, self.kind, self.config.hashed(), self.needs.model_dump(exclude_none=True)]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        slug = "-".join(str(value) for value in self.names.model_dump(exclude_none=True).values())
        plain = "".join(char if char.isalnum() or char in "-." else "_" for char in slug)
        short = plain[:120].encode()[:_LONGEST].decode(errors="ignore")
        return f"{self.kind}-{short}-{digest[:10]}"

    @property
    def needed(self) -> tuple[str, ...]:
        """The ids of the cells that come before it."""
        return tuple(self.needs.model_dump(exclude_none=True).values())

    def record(self) -> dict[str, Any]:
        """What the cell's record says about what it is."""
        return {
            "id": self.id,
            "kind": self.kind,
            "names": self.names.model_dump(exclude_none=True),
            "config": self.config.model_dump(mode="json"),
            "needs": self.needs.model_dump(exclude_none=True),
        }

    @abstractmethod
    def run(self, folder: StudyFolder, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Do the work.

        Args:
            folder: has what the cell needs, and takes what it leaves for others; its work folder is the cell's own.

        Returns:
            What the cell's record says as its result: scores, curve, seconds, ...
        """


def load_plugins(plugins: Sequence[Plugin]) -> None:
    """Import them in this process too, which may not be the one that read the study."""
    for plugin in plugins:
        load_plugin(plugin.path)


@contextmanager
def unlabelled_text(examples: Examples, work: Path) -> Iterator[Path]:
    """The text that grafts are made on, without labels, as a file for the time of a block."""
    path = work / "text.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    text_file(read_unlabelled(examples.spec, examples.language), path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
