"""Running the cells of a study: in this process or on Ray, each finished cell kept, whatever happens to the others.

    OUT/study.json        the study as it was last run
    OUT/cells/ID.json     a finished cell
    OUT/failures/ID.json  why a cell failed; it is tried again by the next run
    OUT/artifacts/ID/     what a cell leaves for others
    OUT/work/ID/          what an unfinished cell can go on from
    OUT/locks/ID.json     who is at it

OUT may lie on storage that several machines share.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from peft_graft.alignment.sharding import start_ray
from peft_graft.environment import hardware, versions
from peft_graft.errors import GraftError, StudyError
from peft_graft.files import read_json
from peft_graft.options import Progress
from peft_graft.study.cells import Cell, cells_of, do_cell
from peft_graft.study.spec import Study

State = Literal["done", "failed", "busy"]
#: A lock of another machine that has not been touched for this long is nobody's, seconds.
STALE, _HEARTBEAT, _POLL = 120.0, 20.0, 2.0


@dataclass
class Outcome:
    """What became of a study's cells: ids by state; ``blocked`` ones need a cell that failed."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)


class Executor(Protocol):
    """Where cells are done."""

    def submit(self, cell: Cell) -> None:
        """Start, or queue, a cell."""

    def wait(self) -> tuple[Cell, State]:
        """The next cell that has ended, and how."""

    @property
    def free(self) -> int:
        """How many more cells can be started now."""


class Here:
    """Cells one after another in this process."""

    def __init__(self, out: Path, progress: Progress | None = None) -> None:
        self.out, self.progress = out, progress
        self._queue: list[Cell] = []

    @property
    def free(self) -> int:
        """One at a time."""
        return 1 - len(self._queue)

    def submit(self, cell: Cell) -> None:
        """Queue a cell."""
        self._queue.append(cell)

    def wait(self) -> tuple[Cell, State]:
        """Do the queued cell."""
        cell = self._queue.pop()
        return cell, execute(cell, self.out, self.progress)


class OnRay:
    """Cells on a Ray cluster; those of a worker that dies are started again elsewhere.

    Args:
        address: of the cluster, or ``local`` to use this machine. cpus, gpus: that one cell takes.
    """

    def __init__(self, out: Path, address: str, cpus: float, gpus: float) -> None:
        ray = self._ray = start_ray(address)
        total: dict[str, float] = ray.cluster_resources()
        room = [total.get("CPU", 0) // cpus if cpus else None, total.get("GPU", 0) // gpus if gpus else None]
        self._slots = int(min(value for value in room if value is not None))
        if not self._slots:
            raise StudyError(
                "no node has room for a cell", where=f"--ray {address}", expected=f"{cpus:g} CPUs and {gpus:g} GPUs",
                found=f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs in all",
            )  # fmt: skip
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=-1)(_on_worker)
        self._out, self._threads = str(out), max(1, int(cpus))
        self._running: dict[Any, Cell] = {}

    @property
    def free(self) -> int:
        """Cells that fit beside those that run."""
        return self._slots - len(self._running)

    def submit(self, cell: Cell) -> None:
        """Hand a cell to the cluster."""
        self._running[self._remote.remote(cell, self._out, self._threads)] = cell

    def wait(self) -> tuple[Cell, State]:
        """The next cell that a worker has ended."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        cell = self._running.pop(ready[0])
        return cell, self._ray.get(ready[0])


def _on_worker(cell: Cell, out: str, threads: int) -> State:
    torch.set_num_threads(threads)
    return execute(cell, Path(out))


# ---- the loop --------------------------------------------------------------------------------------------------------


def run_study(
    study: Study, out: Path, executor: Executor, *, only: str | None = None, progress: Progress | None = None
) -> Outcome:
    """Do every cell that is not done yet, each after those that it needs.

    An interruption loses the cells that were running, no others.

    Raises:
        StudyError: ``only`` matches nothing, or ``out`` cannot be used.
    """
    cells = cells_of(study, only)
    _prepare(study, out)
    outcome = Outcome()
    waiting = dict(cells)
    running: set[str] = set()
    while waiting or running:
        for name, cell in list(waiting.items()):
            if result_path(out, name).exists():
                outcome.done.append(name)
                del waiting[name]
            elif set(cell.needs) & {*outcome.failed, *outcome.blocked}:
                outcome.blocked.append(name)
                del waiting[name]
            elif executor.free > 0 and set(cell.needs) <= set(outcome.done):
                executor.submit(cell)
                running.add(name)
                del waiting[name]
        if progress:
            progress("cells", len(outcome.done), len(cells))
        if not running:
            continue
        cell, state = executor.wait()
        running.discard(cell.id)
        if state == "busy":  # another run of the study is at it
            waiting[cell.id] = cell
            time.sleep(_POLL)
        else:
            (outcome.done if state == "done" else outcome.failed).append(cell.id)
    if progress:
        progress("cells", len(outcome.done), len(cells))
    return outcome


def execute(cell: Cell, out: Path, progress: Progress | None = None) -> State:
    """Do one cell and keep its result or its error; nothing when it is done already or somebody else is at it."""
    if result_path(out, cell.id).exists():
        return "done"
    with _claimed(out / "locks" / f"{cell.id}.json") as mine:
        if not mine:
            return "busy"
        if result_path(out, cell.id).exists():
            return "done"
        work, start = out / "work" / cell.id, time.perf_counter()
        record: dict[str, Any] = {"id": cell.id, "kind": cell.kind, "names": cell.names, "config": cell.config,
                                  "needs": list(cell.needs)}  # fmt: skip
        try:
            found = do_cell(cell, out / "artifacts", work, progress)
        except Exception as error:  # whatever it is, the other cells go on, and this one says why
            record |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            _write(out / "failures" / f"{cell.id}.json", _described(record, start))
            return "failed"
        _write(result_path(out, cell.id), _described({**record, "result": found}, start))
        (out / "failures" / f"{cell.id}.json").unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        return "done"


def result_path(out: Path, name: str) -> Path:
    """Where a finished cell's result is."""
    return out / "cells" / f"{name}.json"


def estimate(cells: Mapping[str, Cell], out: Path) -> tuple[dict[str, int], float | None]:
    """Cells left by kind, and the seconds that they will take one after another, from the finished ones of their kind.

    The time is None while a kind has no finished cell to go by.
    """
    left: dict[str, int] = {}
    known: dict[str, list[float]] = {}
    for name, cell in cells.items():
        if result_path(out, name).exists():
            known.setdefault(cell.kind, []).append(float(read_json(result_path(out, name))["seconds"]))
        else:
            left[cell.kind] = left.get(cell.kind, 0) + 1
    if not set(left) <= set(known):
        return left, None
    return left, sum(count * statistics.fmean(known[kind]) for kind, count in left.items())


def _prepare(study: Study, out: Path) -> None:
    try:
        for name in ("cells", "failures", "artifacts", "work", "locks"):
            (out / name).mkdir(parents=True, exist_ok=True)
        _write(out / "study.json", study.model_dump(mode="json"))
    except OSError as error:
        raise StudyError(f"cannot be written ({error.strerror})", where=str(out), fix="choose another --out") from error


def _described(record: dict[str, Any], start: float) -> dict[str, Any]:
    device = str(record["config"].get("device", "cpu"))
    with contextlib.suppress(GraftError, RuntimeError, AssertionError):  # a failure may be of the device itself
        record["hardware"] = hardware(device)
    return {**record, "seconds": round(time.perf_counter() - start, 2), "versions": versions(), "finished": time.time()}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON aside and rename it into place, so that a file that exists is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False, default=list)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


# ---- locks -----------------------------------------------------------------------------------------------------------


@contextmanager
def _claimed(lock: Path) -> Iterator[bool]:
    """Hold a lock file; False when somebody alive holds it. One left by a process that died is taken over."""
    while True:
        try:
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if not _abandoned(lock):
                yield False
                return
            # Of several that find it abandoned one renames it away; the others find the new lock or none.
            with contextlib.suppress(FileNotFoundError):
                stale = lock.with_suffix(f".{os.getpid()}.stale")
                lock.rename(stale)
                stale.unlink()
            continue
        break
    with os.fdopen(handle, "w") as file:
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}, file)
    stop = threading.Event()
    beat = threading.Thread(target=_keep_fresh, args=(lock, stop), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        stop.set()
        lock.unlink(missing_ok=True)


def _keep_fresh(lock: Path, stop: threading.Event) -> None:
    while not stop.wait(_HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(lock)


def _abandoned(lock: Path) -> bool:
    """Whether the process that holds a lock is gone: known on its own machine, guessed from silence on another."""
    try:
        age = time.time() - lock.stat().st_mtime
        owner = json.loads(lock.read_text() or "{}")
    except FileNotFoundError:
        return False  # released just now; the next attempt will tell
    except json.JSONDecodeError:
        owner = {}
    if not owner:  # being written, or its writer died in the middle
        return age > _POLL
    if owner["host"] == socket.gethostname():
        return bool(_started(owner["pid"]) != owner["started"])
    return age > STALE


def _started(pid: int) -> float | None:
    """When a process began, None when there is none; tells a process from a later one of the same number."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None
