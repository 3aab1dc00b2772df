"""What a verb prints with ``--json``, where that is more than its function returns; and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from peft_graft._evaluate import Evaluation
from peft_graft.alignment.alignment import Alignment
from peft_graft.record import Record
from peft_graft.report import GraftReport
from peft_graft.shelf import ShelfReport


class Placed(Record):
    """A result that was written somewhere."""

    @classmethod
    def at(cls, found: Record, out: Path | None) -> Self:
        """The result with the place where it lies."""
        return cls.model_validate({**dict(found), "out": None if out is None else str(out)})


class PageResult(Placed):
    """The page that was written."""

    out: str


class TransferResult(Placed, GraftReport):
    """``graft.json``, the folder that it lies in, and the address on the hub where it was pushed."""

    out: str
    pushed: str | None = None


class ShelfResult(Placed, ShelfReport):
    """What became of several modules, and the folder that their grafts lie in."""

    out: str


class EvaluateResult(Placed, Evaluation):
    """The scores, and the file that they were written to, if any."""

    out: str | None


class AlignResult(Record):
    """An alignment: its folder, where it comes from, and how well each pair of spaces was matched."""

    out: str
    method: str
    details: dict[str, Any]
    pairs: dict[str, dict[str, float]]

    @staticmethod
    def of(found: Alignment, out: Path) -> AlignResult:
        """What is said of an alignment."""
        return AlignResult(
            out=str(out),
            method=found.method,
            details=dict(found.details),
            pairs={f"{pair[0].key} -> {pair[1].key}": dict(value) for pair, value in found.diagnostics.items()},
        )


class Problem(Record):
    """An error: its kind, what is wrong, where, what was expected, what came, and what to do about it."""

    kind: str
    message: str
    where: str | None
    expected: str | None
    found: str | None
    fix: str | None


class ErrorResult(Record):
    """What comes in place of a result when a command fails."""

    error: Problem
