"""Every error that peft-graft raises on purpose.

    GraftError
    ├── CheckpointError      the module's files are not a readable, supported checkpoint
    ├── ModelError           a teacher or student cannot be loaded, or is not what the module needs
    ├── ArchitectureError    a model's layers and roles are not known and cannot be inferred
    ├── PlanError            a site, layer or shape has no counterpart
    ├── HeadError            a classification head cannot be carried
    ├── TextError            the text source is missing, empty or has other columns
    ├── PairingError         too few tokens pair, or activations are not finite
    ├── AlignmentError       an alignment does not fit the models or the module
    ├── DeviceError          the device does not exist
    ├── OutputError          the result cannot be written
    ├── VerificationError    what was written does not load, or does nothing
    ├── DependencyError      an optional library is not installed
    └── StudyError           a study file says something that a study cannot

One message says what is wrong, where, what was expected, what came, and what to do about it.
"""

from __future__ import annotations

import re

#: What a terminal or a page would obey and not show: control codes, line ends, what turns the direction of text round.
_CODES = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 1_000  # of each part of a message


def plain(text: str) -> str:
    """Text on one line, as names that stand in files of others must be shown: codes escaped."""
    return _CODES.sub(lambda code: code[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def _short(value: object) -> str:
    text = str(value)
    return plain(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def reason(error: BaseException) -> str:
    """What an exception of a library says, on one line; by its name, where the text alone says too little."""
    first = (str(error).strip().splitlines() or [""])[0]
    if first and isinstance(error, OSError | RuntimeError | ValueError) and not isinstance(error, RecursionError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


#: What libraries say who get no memory, or no thread, which takes memory.
_NO_MEMORY = re.compile(
    r"(?i)(can't|cannot|failed to|unable to) (allocate|start new thread)|out of memory|not enough memory"
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception of a library says that it got no memory; tokenizers panic for want of threads."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "PanicException"
        or (isinstance(error, RuntimeError | ImportError) and bool(_NO_MEMORY.search(str(error))))
    )


class GraftError(Exception):
    """Root of the errors of this package.

    Args:
        message: what is wrong, without a closing full stop.
        where: the site, file or option concerned, named as the user knows it.
        expected: what would have been right.
        found: what came instead.
        fix: what the user can do.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.message, self.where, self.expected, self.found, self.fix = message, where, expected, found, fix
        text = f"{_short(where)}: {_short(message)}" if where else _short(message)
        if expected is not None:
            text += f"; expected {_short(expected)}"
        if found is not None:
            text += f"{',' if expected is not None else ';'} found {_short(found)}"
        if fix:
            text += f". Fix: {_short(fix)}"
        super().__init__(text)


class CheckpointError(GraftError):
    """The module's files are not a readable, supported checkpoint."""


class ModelError(GraftError):
    """A teacher or student cannot be loaded, or is not the model that the module needs."""


class ArchitectureError(GraftError):
    """A model's layers and roles are not in the table and cannot be inferred."""


class PlanError(GraftError):
    """A site, layer or shape of the module has no counterpart in the student."""


class HeadError(GraftError):
    """A classification head cannot be carried to the student."""


class TextError(GraftError):
    """The text source is missing, empty, or lacks the columns asked for."""


class PairingError(GraftError):
    """Too few tokens of the two models pair, or their activations are not finite."""


class AlignmentError(GraftError):
    """An alignment does not belong to these models, or lacks spaces that the module needs."""


class DeviceError(GraftError):
    """The device asked for does not exist on this machine, or has too little memory."""


class OutputError(GraftError):
    """The result cannot be written where it was asked for."""


class VerificationError(GraftError):
    """The written checkpoint does not load cleanly, or changes nothing in the student."""


class DependencyError(GraftError):
    """An optional library that this operation needs is not installed."""


class StudyError(GraftError):
    """A study file cannot be read, or says something that a study cannot."""


def not_installed(library: str, extra: str, where: str | None = None, *, so: str = "") -> DependencyError:
    """The error for a library that an extra of this package brings.

    Args:
        so: what follows from its lack, such as ``so the module cannot be run``.
    """
    message = f"{library} is not installed" + f", {so}" * bool(so)
    return DependencyError(message, where=where, fix=f"pip install 'peft-graft[{extra}]'")
