"""Places of output: whole or not at all, one process at a time, put right after a kill."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import peft_graft
from peft_graft.checkpoints.read import locate
from peft_graft.errors import CheckpointError, GraftError, OutputError
from peft_graft.files import write_tensors
from peft_graft.outputs import (
    check_output,
    check_place,
    read_state,
    reserved,
    reserving_output,
    temporary_folder,
    write_aside,
    write_state,
    written_aside,
)


def test_of_several_processes_the_first_alone_holds_the_place(monkeypatch, tmp_path: Path) -> None:
    """Before they have heard of each other: nothing is waited for."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    held = reserving_output(lambda *, out: names(tmp_path))
    for number, lock in (("0", [".out.lock"]), ("1", [])):
        monkeypatch.setenv("RANK", number)
        assert held(out=tmp_path / "out") == lock


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(out: Path, text: str) -> None:
    with written_aside(out, force=True) as staging:
        (staging / "content").write_text(text)


def killed_at_rename(number: int, work: Callable[[], object]) -> None:
    """Do the work in another process, which is killed where it would rename for the ``number``-th time."""
    if not (child := os.fork()):
        rename, calls = Path.rename, [0]

        def counted(path: Path, target: Path) -> Path:
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)

        Path.rename = counted  # type: ignore[method-assign, assignment]
        work()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_kill_left_is_put_right_by_the_next_run(tmp_path: Path, caplog, number: int) -> None:
    out = tmp_path / "out"
    write(out, "first")
    killed_at_rename(number, lambda: write(out, "second"))
    assert out.exists() == (number == 1)
    assert len(names(tmp_path)) > 1
    if number == 2:
        with pytest.raises(CheckpointError) as refused:
            locate(out)
        aside = next(tmp_path.glob(".out.*.old")) / "old"
        assert str(refused.value) == (
            f"{out}: a run was killed while it replaced this folder; found what was there in {aside}. "
            "Fix: start that run again, which brings it back, or move it there"
        )
    with pytest.raises(OutputError, match="exists already"), written_aside(out):
        pass
    assert names(tmp_path) == ["out"]
    assert (out / "content").read_text() == "first"
    said = f"{out}: what was there is back; a run was killed while it replaced it"
    assert caplog.messages == ([] if number == 1 else [said])
    write(out, "third")
    assert (out / "content").read_text() == "third"
    assert names(tmp_path) == ["out"]


def test_an_interruption_between_the_renames_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "out", "first")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        write(tmp_path / "out", "second")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "content").read_text() == "first"


def test_everything_in_an_output_can_be_read_by_those_who_may(tmp_path: Path) -> None:
    """Files of sub-folders too, which stay folders that can be entered."""
    old = os.umask(0o022)
    try:
        with written_aside(tmp_path / "out") as staging:
            (staging / "inner" / "most").mkdir(parents=True)
            for file in (staging / "a", staging / "inner" / "b", staging / "inner" / "most" / "c"):
                file.touch(0o600)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {"inner": 0o755, "most": 0o755, "a": 0o644, "b": 0o644, "c": 0o644}


def test_what_lies_beside_another_output_is_left_alone(tmp_path: Path) -> None:
    others = [".a.b.abcdefgh.partial", ".a.notours.partial", ".a.abcdefgh.kept", "a.abcdefgh.old"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".a.abcdefgh.partial").write_text("half")
    write_aside(tmp_path / "a", "whole")
    assert names(tmp_path) == sorted([*others, "a"])


def test_a_place_has_one_writer_at_a_time_and_outlives_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    told, tell = os.pipe()
    if not (child := os.fork()):
        with reserved(out):
            os.write(tell, b"!")
            time.sleep(60)
        os._exit(1)
    os.read(told, 1)
    with pytest.raises(OutputError) as refused, written_aside(out):
        pass
    assert str(refused.value) == f"{out}: another process is writing there. Fix: wait for it, or choose another --out"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with reserved(out):
        write(out, "ours")  # a place that is held may be written
    assert names(out.parent) == ["out"]


def test_a_refusal_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), reserved(tmp_path / "a" / "b" / "out"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "verb",
    [
        lambda out: peft_graft.transfer("nowhere", "nowhere", out=out),
        lambda out: peft_graft.align("nowhere", "nowhere", text="nowhere.txt", out=out),
        lambda out: peft_graft.evaluate("nowhere", text="nowhere.txt", out=out),
    ],
)
def test_a_place_that_cannot_be_written_is_the_first_thing_to_be_said(tmp_path: Path, verb) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", Path("/proc/out"), tmp_path / ("x" * 250)):
        with pytest.raises(OutputError, match="cannot be written .*nothing was changed"):
            verb(out)
    with pytest.raises(GraftError, match="nowhere"):
        verb(tmp_path / "new" / "out")
    assert names(tmp_path) == ["file"]


def test_a_full_disk_names_the_bytes(tmp_path: Path, monkeypatch) -> None:
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("peft_graft.files.save_file", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4096))
    write(tmp_path / "out", "first")
    with (
        pytest.raises(OutputError) as refused,
        written_aside(tmp_path / "out", force=True) as staging,
    ):
        write_tensors(staging / "x.safetensors", {"x": torch.zeros(2000)})
    fix = "Fix: check permissions and free space, or choose another --out; nothing was changed"
    reason = "No space left on device: more than 8,000 bytes are needed, 4,096 are free"
    assert str(refused.value) == f"{tmp_path / 'out'}: cannot be written ({reason}). {fix}"
    assert (tmp_path / "out" / "content").read_text() == "first"
    with pytest.raises(OutputError) as refused, written_aside(tmp_path / "out", force=True):
        raise OSError(errno.ENOSPC, "No space left on device")
    reason = "No space left on device: 4,096 bytes are free"
    assert str(refused.value) == f"{tmp_path / 'out'}: cannot be written ({reason}). {fix}"


@pytest.mark.parametrize(("code", "written"), [(errno.EDQUOT, False), (errno.EIO, False), (errno.EINVAL, True)])
def test_what_the_system_says_last_counts(tmp_path: Path, monkeypatch, code: int, written: bool) -> None:
    write(tmp_path / "out", "first")

    def refused(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refused)
    if written:
        write(tmp_path / "out", "second")
    else:
        with pytest.raises(OutputError, match=os.strerror(code)):
            write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "content").read_text() == ("second" if written else "first")
    assert names(tmp_path) == ["out"]


def test_no_room_for_temporary_files_is_one_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    fix = "Fix: make room there, or name another folder with the variable TMPDIR; nothing was changed"
    with pytest.raises(OutputError) as refused, temporary_folder():
        pass
    said = "the folder for temporary files cannot be written (Not a directory)"
    assert str(refused.value) == f"{tmp_path / 'file'}: {said}. {fix}"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OutputError, match="No space left on device"), temporary_folder():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), temporary_folder():  # which has nothing to do with it
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")


def test_a_state_is_found_by_its_key_alone_and_whole_after_a_kill(tmp_path: Path, caplog) -> None:
    folder, tensors = tmp_path / "work" / "state", {"x": torch.arange(3)}
    assert read_state(folder, "key") is None
    write_state(folder, tensors, {"key": "key", "step": 1})
    killed_at_rename(2, lambda: write_state(folder, tensors, {"key": "key", "step": 2}))
    found = read_state(folder, "key")
    assert found is not None
    assert found[1] == {"key": "key", "step": 1}
    assert torch.equal(found[0]["x"], tensors["x"])
    assert read_state(folder, "another") is None
    caplog.clear()
    (folder / "state.safetensors").write_bytes(b"cut off")
    assert read_state(folder, "key") is None
    assert "the work begins anew, since its state cannot be used" in caplog.text


@pytest.mark.parametrize("out", [".", "..", "../..", "../here", "{}"])
def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch, out: str) -> None:
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    place = Path(out.format(here))
    for force in (False, True):
        with pytest.raises(OutputError, match=r"is the current folder.*Fix: name one in it: --out .*graft"):
            check_place(place, force=force)
        with pytest.raises(OutputError, match="is the current folder"), written_aside(place, force=force):
            pass
    assert list(tmp_path.rglob("*")) == [here.parent, here]


def test_the_current_folder_is_held_by_its_name(tmp_path: Path, monkeypatch) -> None:
    """So that those who write beside it can."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with reserved(Path()):
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [".here.lock"]


def test_outputs_are_checked_as_before_while_they_are_held(tmp_path: Path) -> None:
    with reserved(tmp_path / "out"):
        check_output(tmp_path / "out", force=False)
    assert names(tmp_path) == []
