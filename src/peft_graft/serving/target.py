"""What every form of export can do, and which there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, TypeVar

from peft_graft.config import ExportConfig, Target
from peft_graft.record import Record
from peft_graft.serving.subject import Comparison, Subject


class Written(Record):
    """What was written.

    ``kept``: of what the module changes in the weights, the share that is in the written one, by squared norms; None
    where that is not measured. ``use``: the command, or the line of Python, that loads it, with ``{out}`` for the
    folder and ``{base}`` for the base.
    """

    comparison: Comparison | None
    kept: float | None = None
    notes: list[str] = []
    use: str


class Form(ABC):
    """A form that grafts are exported to; a subclass is registered by ``register_form``."""

    target: ClassVar[Target]
    #: Whether the base's own dtype matters to what is written; else float32 is taken, which rounds nothing.
    rounds: ClassVar[bool] = True

    @abstractmethod
    def check(self, subject: Subject, config: ExportConfig) -> None:
        """Refuse what cannot be had in this form, before weights are loaded.

        Raises:
            PlanError: it cannot. DependencyError: a library for it is not installed.
        """

    def needs_base(self, subject: Subject) -> bool:
        """Whether the base is to be loaded before ``write``."""
        return True

    @abstractmethod
    def write(self, folder: Path, subject: Subject, config: ExportConfig) -> Written:
        """Write the module into an existing folder, read it again and compare.

        Raises:
            VerificationError: it answers otherwise.
        """


FormClass = TypeVar("FormClass", bound=type[Form])
FORMS: dict[Target, Form] = {}


def register_form(cls: FormClass) -> FormClass:
    """Make a form known; for use as a class decorator."""
    FORMS[cls.target] = cls()
    return cls
