"""Two thousand broken and hostile files; ``python tests/mutants.py`` tries as many as one likes."""

from __future__ import annotations

import pytest

import mutants


@pytest.mark.filterwarnings("ignore")  # of the libraries that make what is mutated
def test_mutants_are_read_or_refused_in_one_line(tmp_path) -> None:
    mutants.make(tmp_path)
    items = mutants.corpus(tmp_path)
    for item in items:
        assert mutants.fault(item, item.folder) is None, item.name
    assert not list(mutants.faults(items, iter(range(2000)), 0, tmp_path / "mutant"))


@pytest.mark.parametrize("kind", ["code", "writes", "looks up", "raises", "two lines"])
def test_what_must_not_happen_is_seen(kind: str, tmp_path) -> None:
    def read(folder) -> None:
        import pickle
        import socket

        from peft_graft.errors import GraftError

        if kind == "code":
            pickle.loads(pickle.dumps(mutants._Code()))
        elif kind == "writes":
            (folder / "file").write_text("")
        elif kind == "looks up":
            socket.getaddrinfo("127.0.0.1", 80)
        elif kind == "two lines":
            error = GraftError("one")
            error.args = ("one\ntwo",)
            raise error
        else:
            raise KeyError("x")

    assert mutants.fault(mutants.Item("item", tmp_path, read), tmp_path)
