"""A system that gives no memory, or no thread: one line, whatever a library raises."""

from __future__ import annotations

import importlib

import pytest

cli = importlib.import_module("peft_graft.cli.main")  # whose name in the package is the command itself


class PanicException(BaseException):
    """What tokenizers raises where it gets no threads."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError"),
        (PanicException("The global thread pool has not been initialized"), "PanicException: The global thread pool"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "can't allocate memory"),
        (ImportError("libx.so: failed to map: Cannot allocate memory"), "Cannot allocate memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_memory_is_one_line(error: BaseException, said: str, monkeypatch, capsys) -> None:
    def app(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    shown = capsys.readouterr().err
    assert caught.value.code == 1
    assert shown.startswith("error: there is not enough memory, or no more threads (")
    assert said in shown
    assert "RAYON_NUM_THREADS" in shown
    assert shown.count("\n") == 1


def test_other_errors_of_libraries_are_not_taken_for_it(monkeypatch) -> None:
    def app(**_: object) -> None:
        raise RuntimeError("another")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(RuntimeError, match="another"):
        cli.main()
