"""Candidates are kept in memory: each is attached once, and no file is written where none was asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import peft
import pytest
import transformers

import tiny

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_watching: list[list[str]] = []


def _audit(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    made = event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "tempfile.mkdtemp", "tempfile.mkstemp")
    opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
    if (made or opened) and not str(arguments[0]).startswith("/dev/"):
        _watching[-1].append(f"{event} {arguments[0]}")


@pytest.fixture
def writes() -> Iterator[list[str]]:
    """Whatever is created or opened for writing while a test runs."""
    if not getattr(sys, "_audited", False):  # a hook stays for as long as the process
        sys.addaudithook(_audit)
        sys._audited = True  # type: ignore[attr-defined]
    _watching.append([])
    yield _watching[-1]
    _watching.pop()


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of every ``PeftModel`` that was made."""
    made: list[str] = []
    plain = peft.PeftModel.__init__

    def counted(self, *arguments, **options) -> None:
        made.append(type(self).__name__)
        plain(self, *arguments, **options)

    monkeypatch.setattr(peft.PeftModel, "__init__", counted)
    return made


def in_memory(world, teacher: str = "teacher", student: str = "narrow") -> dict:
    models = [transformers.AutoModel.from_pretrained(world / name) for name in (teacher, student)]
    tokenizers = [transformers.AutoTokenizer.from_pretrained(world / name) for name in (teacher, student)]
    return {"teacher": models[0], "student": models[1], "teacher_tokenizer": tokenizers[0],
            "student_tokenizer": tokenizers[1], "text": tiny.sentences(100)}  # fmt: skip


def test_the_default_writes_nothing_and_attaches_every_candidate_once(world, writes, attached) -> None:
    given = in_memory(world)
    writes.clear()
    graft = tiny.transfer_live(world / "lora", **given, polish=20)
    assert writes == []
    methods = {name.split(",")[0] for name in graft.report.tried}
    assert methods == {"prune-align", "procrustes", "ridge", "functional"}
    assert len(graft.report.polish.pilots) == 3
    assert any(name.endswith("head fitted") for name in graft.report.tried)
    assert len(attached) == 1 + len(methods), "the teacher and every candidate"


def test_a_module_on_a_bare_model_too(world, tmp_path, writes, attached) -> None:
    tiny.peft_lora(tmp_path / "m", world / "teacher", task="base")
    given = in_memory(world)
    writes.clear()
    attached.clear()
    graft = tiny.transfer_live(tmp_path / "m", **given, method="prune-align", polish=2)
    assert graft.report.polish is not None
    assert writes == []
    assert len(attached) == 2


def test_a_head_that_shares_the_students_pooler_gets_one_of_its_own(world, tmp_path, attached) -> None:
    """A fitted one differs from the student's, so there is more to attach than there was."""
    tiny.peft_lora(tmp_path / "m", world / "teacher", task="sequence-classification", labels=("a", "b", "c"))
    student = transformers.AutoModel.from_pretrained(world / "teacher")
    student.encoder.layer = student.encoder.layer[:2]
    student.config.num_hidden_layers = 2
    given = {**in_memory(world), "student": student}
    attached.clear()
    graft = tiny.transfer_live(tmp_path / "m", **given, method="copy", head="fit")
    assert graft.report.head.how == "fitted"
    assert len(attached) == 3
    assert graft.save_pretrained(tmp_path / "g").report.verification.done
