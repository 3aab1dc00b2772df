"""Places of output: written whole or not at all, by one process at a time, and put right after one that was killed."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from filelock import FileLock, Timeout
from torch import Tensor

from peft_graft.errors import CheckpointError, OutputError
from peft_graft.files import FULL, read_json, read_tensors, write_json, write_tensors
from peft_graft.processes import Processes

logger = logging.getLogger("peft_graft")
#: Files by which a folder says that this package wrote it.
WRITTEN = ("graft.json", "alignment.json", "export.json", "study.json")
#: Endings of what lies beside an output while it is written: what takes its place, and the folder of what was there.
_PARTIAL, _ASIDE = ".partial", ".old"
#: What was there, in that folder; and the files of a state that is kept.
_OLD, _STATE = "old", "state"
_P = ParamSpec("_P")
_T = TypeVar("_T")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Errors of the file system as ours.

    Raises:
        OutputError: ``out`` cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a library's own OSError, nothing to do with writing here
            raise
        reason = str(error.strerror)
        if error.errno in FULL and "bytes" not in reason:  # ``write_tensors`` knows how many are needed
            reason += f": {shutil.disk_usage(_nearest(out)).free:,} bytes are free"
        raise OutputError(
            f"cannot be written ({reason})",
            where=str(out),
            fix="check permissions and free space, or choose another --out; nothing was changed",
        ) from error


def _nearest(path: Path) -> Path:
    """The folder that something is in, or would be in."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for the time of a block.

    Raises:
        OutputError: there is none to be had, or it is full.
    """
    made = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = True
            yield Path(folder)
    except OSError as error:
        if made and error.errno not in FULL:  # nothing to do with writing here
            raise
        raise OutputError(
            f"the folder for temporary files cannot be written ({error.strerror})",
            where=tempfile.tempdir or os.environ.get("TMPDIR"),
            fix="make room there, or name another folder with the variable TMPDIR; nothing was changed",
        ) from error


@contextmanager
def reserved(out: Path) -> Iterator[None]:
    """Hold the place of an output against other processes; what one that was killed there left is put right first.

    The system lets go of it for a process that dies. Inside of such a block the same place may be reserved again.

    Raises:
        OutputError: another process holds it, or it cannot be written.
    """
    out = out if out.name not in ("", "..") else out.resolve()  # the current folder has a name as others have
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(out.absolute().parent / f".{out.name}.lock", is_singleton=True, thread_local=False)
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                # The library says the same of a place where no file can be made; this says why.
                with tempfile.TemporaryDirectory(dir=out.parent):
                    raise OutputError(
                        "another process is writing there", where=str(out), fix="wait for it, or choose another --out"
                    ) from error
        try:
            if lock.lock_counter == 1:
                with writing(out):
                    _put_right(out)
            yield
        finally:
            if lock.lock_counter == 1:
                Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: who has opened it sees that
            lock.release()
    finally:
        for folder in made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def _put_right(out: Path) -> None:
    """Bring back an output whose replacement was cut off, and remove what unfinished writing left beside it."""
    for path in _left(out):
        if path.name.endswith(_ASIDE) and not out.exists():
            with suppress(FileNotFoundError):
                (path / _OLD).rename(out)
                logger.warning("%s: what was there is back; a run was killed while it replaced it", out)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _left(out: Path) -> list[Path]:
    """What unfinished writing left beside an output."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}({_PARTIAL}|{_ASIDE})")
    return sorted(path for path in out.parent.iterdir() if name.fullmatch(path.name)) if out.parent.is_dir() else []


def kept_aside(out: Path) -> Path | None:
    """Where that is which was at a place, if a run was killed while it replaced it; None if none was."""
    return next((path / _OLD for path in _left(out) if (path / _OLD).exists()), None)


@contextmanager
def written_aside(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place when the block ends well, and vanishes when it does not.

    Of a link it is the place that it leads to.

    Raises:
        OutputError: ``out`` exists and ``force`` is not set, its place cannot be written (permissions, full disk), or
            another process is writing there.
    """
    out = out.resolve() if out.is_symlink() else out
    with reserved(out):
        check_output(out, force=force)
        staging: Path | None = None
        try:
            with writing(out):
                staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=_PARTIAL, dir=out.parent))
                staging.chmod(0o777 & ~umask())
                yield staging
                staging.chmod(0o777 & ~umask())  # what is copied into it may have brought its own folder's
                for path in staging.rglob("*"):
                    # Safetensors writes files for the owner alone.
                    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())
                    _flush(path)
                _swap_in(staging, out, force=force)
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)


def reserving_output(verb: Callable[_P, _T]) -> Callable[_P, _T]:
    """A verb that holds the place of its ``out`` while it runs, so that one that cannot be written fails at once.

    Of the processes of torchrun or accelerate the first alone holds it, which writes.

    Raises:
        OutputError: see ``reserved``.
    """

    @wraps(verb)
    def held(*args: _P.args, **options: _P.kwargs) -> _T:
        out = options.get("out")
        if out is not None and not isinstance(out, str | os.PathLike):
            raise OutputError("this names no place", where="out", expected="a path", found=type(out).__name__)
        if out is None or not Processes.started().first:
            return verb(*args, **options)
        with reserved(Path(str(out))):
            return verb(*args, **options)

    return held


def write_state(folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Replace the state that is kept in a folder: a kill leaves the last whole one or the one before.

    Args:
        record: what else is to be known; ``key`` says of which work it is.
    """
    with written_aside(folder, force=True) as staging:
        write_tensors(staging / f"{_STATE}.safetensors", tensors)
        write_json(staging / f"{_STATE}.json", record)


def read_state(folder: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The state that is kept in a folder; None where there is none of this work, or it is damaged."""
    if not folder.parent.is_dir():
        return None
    with reserved(folder):  # which brings back one that a kill left aside
        if not (folder / f"{_STATE}.json").is_file():
            return None
        try:
            record = read_json(folder / f"{_STATE}.json")
            if record.get("key") == key:
                return read_tensors(folder / f"{_STATE}.safetensors"), record
            logger.warning("the work begins anew: %s is of a run with other settings, inputs or versions", folder)
            return None
        except CheckpointError as error:
            logger.warning("the work begins anew, since its state cannot be used: %s", error)
            return None


def check_output(out: Path, *, force: bool) -> None:
    """Refuse early what ``written_aside`` would refuse in the end: an existing target without ``force``, and the
    current folder, in whose place nothing can be put.

    Raises:
        OutputError: the target exists and ``force`` is not set, or it is the current folder or holds it.
    """
    if _holds_current(out):
        raise OutputError(
            "is the current folder, or holds it, and cannot be replaced",
            where=str(out),
            expected="a new folder",
            fix=f"name one in it: --out {out / 'graft'}",
        )
    if out.is_file() or (out.exists() and not force):
        raise OutputError(
            "exists already" if out.is_dir() else "is a file, not a folder",
            where=str(out),
            fix="choose another --out" + (", or replace it with --force" if out.is_dir() else ""),
        )


def _holds_current(out: Path) -> bool:
    """Whether a folder is the current one, or one that it is in."""
    try:
        current = Path.cwd()
    except FileNotFoundError:  # someone has removed it
        return False
    return out.resolve() in (current, *current.parents)


def check_place(out: Path, *, force: bool) -> None:
    """``check_output`` of a place that a user named: a folder that this package has not written is never replaced.

    Raises:
        OutputError: see ``check_output``; or the folder holds files, and none that says what it is.
    """
    check_output(out, force=force)
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in WRITTEN):
        raise OutputError(
            "is a folder with other things in it, which would be lost",
            where=str(out),
            expected=f"a folder that peft-graft wrote, with one of {', '.join(WRITTEN)}",
            fix="choose another --out, or remove it yourself",
        )


def check_apart(out: str | Path | None, inputs: Iterable[object]) -> None:
    """Refuse an output whose folder is, or holds, what a run reads, which would be lost.

    Args:
        inputs: paths among other things.

    Raises:
        OutputError: it is so.
    """
    if out is None:
        return
    place = Path(out).resolve()
    for one in inputs:
        if not isinstance(one, str | Path):
            continue
        try:
            path = Path(one).expanduser().resolve(strict=True)
        except (OSError, ValueError, RuntimeError):  # no path
            continue
        if place in (path, *path.parents):
            raise OutputError(
                "is what the run reads, which would be lost" if place == path else "holds what the run reads",
                where=str(out),
                found=str(one),
                fix="choose another --out",
            )


def check_output_file(out: Path, *, force: bool) -> None:
    """Refuse early what ``write_aside`` would refuse in the end.

    Raises:
        OutputError: there is a folder of this name, or a file and ``force`` is not set.
    """
    if out.is_dir() or (out.exists() and not force):
        raise OutputError(
            "is a folder, not a file" if out.is_dir() else "exists already",
            where=str(out),
            fix="choose another --out" + ("" if out.is_dir() else ", or replace it with --force"),
        )


def write_aside(out: Path, content: str, *, force: bool = False) -> None:
    """Write a text file that appears whole or not at all.

    Raises:
        OutputError: see ``written_aside``.
    """
    with reserved(out):
        check_output_file(out, force=force)
        staging: Path | None = None
        try:
            with writing(out):
                handle, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=_PARTIAL, dir=out.parent)
                staging = Path(name)
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(content)
                staging.chmod(0o666 & ~umask())
                _flush(staging)
                staging.replace(out)
        finally:
            if staging is not None:
                staging.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Bring a file to the disk before it takes the place of another: some systems say only then that it is full."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (*FULL, errno.EIO):
                raise  # other systems know no such call


def umask() -> int:
    """The bits that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap_in(staging: Path, out: Path, *, force: bool) -> None:
    check_output(out, force=force)  # someone may have written there meanwhile
    if not out.exists():
        staging.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=_ASIDE, dir=out.parent))
    try:
        out.rename(aside / _OLD)
        staging.rename(out)
    finally:
        if not out.exists():  # an error or an interruption came between the two; after a kill, _put_right does it
            with suppress(FileNotFoundError):
                (aside / _OLD).rename(out)
        shutil.rmtree(aside, ignore_errors=True)
